"""Our Moshi beside the moshi package (the oracle) on the same checkpoints; `test_moshi.py` has what is frozen of it."""

import pytest
import torch

from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.models.moshi.generate import Sampling, generate, load_voice, persona_prompt
from eqknobs.models.moshi.interventions import zeroed_heads
from eqknobs.models.moshi.network import KVCache
from helpers import moshi_cases as cases
from helpers.moshi_oracle import oracle, persona_reply, reply
from helpers.moshi_world import write_kyutai, write_persona


@pytest.fixture(scope="module")
def kyutai(tmp_path_factory):
    folder = write_kyutai(tmp_path_factory.mktemp("kyutai"))
    return load_net(find_files("moshi", str(folder))), oracle(folder)


@pytest.fixture(scope="module")
def persona(tmp_path_factory):
    folder = write_persona(tmp_path_factory.mktemp("persona"))
    return load_net(find_files("persona", str(folder))), oracle(folder)


def worst(ours, theirs):
    assert torch.equal(ours.isnan(), theirs.isnan()) and theirs.nan_to_num().std() > 0.5
    return float((ours - theirs).nan_to_num().abs().max())


@torch.no_grad()
def test_logits(kyutai):
    net, lm = kyutai
    ours, theirs = net(cases.CODES), lm(cases.CODES)
    assert worst(ours.text, theirs.text_logits[:, 0]) <= 1e-5
    assert worst(ours.audio, theirs.logits) <= 1e-5
    assert net(cases.CODES, depformer=False).audio is None


@torch.no_grad()
def test_absent_tokens_are_zeros(kyutai):
    net, lm = kyutai
    codes = cases.CODES.clone()
    codes[:, 3] = -1
    codes[:, 0, ::2] = -1
    ours, theirs = net(codes), lm(codes)
    assert worst(ours.text, theirs.text_logits[:, 0]) <= 1e-5 and worst(ours.audio, theirs.logits) <= 1e-5
    assert worst(ours.text, net(cases.CODES).text) > 0.1


@torch.no_grad()
def test_truncated_depformer_keeps_the_agents_logits(persona):
    net, lm = persona
    theirs = lm(cases.CODES)
    assert theirs.logits.shape[1] == 16 and len(net.linears) == 8
    ours = net(cases.CODES)
    assert worst(ours.text, theirs.text_logits[:, 0]) <= 1e-5
    assert worst(ours.audio, theirs.logits[:, :8]) <= 1e-5


def test_greedy_streams(kyutai):
    net, lm = kyutai
    ours, (text, codes) = generate(net, cases.USER), reply(lm, cases.USER)
    assert ours.codes.shape == (2, 8, 100) and len(codes.unique()) > 100
    assert torch.equal(ours.text, text) and torch.equal(ours.codes, codes)


def test_sampled_streams(kyutai):
    net, lm = kyutai
    user = cases.USER[:1, :, : cases.SAMPLED_FRAMES]
    torch.manual_seed(cases.SEED)
    text, codes = reply(lm, user, use_sampling=True)
    ours = generate(net, user, sampling=Sampling(seed=cases.SEED))
    assert torch.equal(ours.text, text) and torch.equal(ours.codes, codes)
    assert not torch.equal(codes, reply(lm, user)[1])


@torch.no_grad()
def test_streamed_hidden_states(kyutai):
    net, lm = kyutai
    columns = net.columns(cases.CODES)
    cache, ours, theirs = KVCache(net, 2, 61), [], []
    with lm.streaming(2):
        for column in columns.unbind(-1):
            ours.append(net.step(column, cache)[0])
            theirs.append(lm.forward_text(column[..., None])[0][:, 0])
    assert worst(torch.stack(ours), torch.stack(theirs)) <= 1e-5


@torch.no_grad()
def test_head_output_is_head_major(kyutai):
    """Zeroing head 2 of a layer at our site = zeroing its columns in the oracle's output projection."""
    net, lm = kyutai
    weight, dim = lm.transformer.layers[1].self_attn.out_projs[0].weight, net.config.head_dim
    kept = weight.clone()
    try:
        weight[:, 2 * dim : 3 * dim] = 0
        theirs = lm(cases.CODES).text_logits[:, 0]
    finally:
        weight.copy_(kept)
    with zeroed_heads(net, {1: [2]}):
        assert worst(net(cases.CODES).text, theirs) <= 1e-5
    assert worst(net(cases.CODES).text, theirs) > 0.1


@pytest.mark.parametrize("kind", ["text only", "recorded voice", "stored voice"])
def test_persona_prompts(persona, kind, tmp_path):
    net, lm = persona
    codes = None if kind == "text only" else cases.VOICE_CODES
    theirs = persona_reply(lm, codes, stored=kind == "stored voice", path=tmp_path / "voice.pt")
    if kind == "stored voice":
        prompt = persona_prompt(cases.PROMPT_TOKENS, net.config, voice=load_voice(tmp_path / "voice.pt", net.config))
    else:
        prompt = persona_prompt(cases.PROMPT_TOKENS, net.config, voice_codes=codes)
    ours = generate(net, cases.PERSONA_USER, prompt)
    assert torch.equal(torch.cat([ours.text[:, None], ours.codes], dim=1), theirs)
