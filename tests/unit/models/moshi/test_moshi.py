"""Moshi without the moshi package: frozen answers of it, streaming, interventions, packing, files and errors."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file, save_file

from eqknobs.corpus.activations import cache_activations
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256
from eqknobs.models import load_model
from eqknobs.models.base import weights_hash
from eqknobs.models.moshi.checkpoint import MoshiFiles, find_files, load_net, save_net
from eqknobs.models.moshi.config import (
    ALL_LINEARS,
    PERSONA_SILENCE,
    PERSONA_SINE,
    MoshiConfig,
    Nf4,
    raw_config,
    read_config,
)
from eqknobs.models.moshi.generate import (
    GREEDY,
    Dialogue,
    Prompt,
    Sampling,
    Voice,
    generate,
    load_voice,
    persona_prompt,
    system_text,
)
from eqknobs.models.moshi.interventions import (
    editing,
    fake_quantise,
    linears,
    masked_streams,
    prune,
    remove_heads,
    zeroed_heads,
)
from eqknobs.models.moshi.loudness import loudness, normalised
from eqknobs.models.moshi.memory import parameters
from eqknobs.models.moshi.monologue import monologue
from eqknobs.models.moshi.network import KVCache, MoshiNet
from eqknobs.models.moshi.quantise import bitsandbytes, is_packed, pack, weight_of, with_weight
from eqknobs.models.moshi.randomise import randomise
from helpers import ROOT
from helpers import moshi_cases as cases
from helpers.moshi_world import KYUTAI, TOKENIZER, hub_tensors, write_codec, write_kyutai, write_persona

FROZEN = ROOT / "tests/fixtures/moshi"
LOST = {0: [1, 2], 1: [0, 1, 2, 3], 2: [3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kyutai(tmp_path_factory.mktemp("moshi") / "kyutai")


@pytest.fixture(scope="module")
def persona_folder(tmp_path_factory):
    return write_persona(tmp_path_factory.mktemp("moshi") / "persona")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return write_codec(tmp_path_factory.mktemp("moshi") / "codec")


def load(folder, **options):
    return load_net(find_files("moshi", str(folder)), **options)


@pytest.fixture(scope="module")
def net(folder):
    return load(folder)


@torch.no_grad()
def logits(net):
    out = net(cases.CODES[:, :, :24])
    return torch.cat([out.text.flatten(), out.audio.nan_to_num().flatten()])


# Frozen oracle


@torch.no_grad()
def test_frozen_answers(net):
    frozen = load_file(FROZEN / "kyutai.safetensors")
    out = net(cases.CODES)
    assert (out.text[0] - frozen["text_logits"]).abs().max() <= 1e-5
    assert (out.audio[cases.LOGITS_SHOWN] - frozen["audio_logits"]).abs().max() <= 1e-5
    greedy = generate(net, cases.USER)
    assert torch.equal(torch.cat([greedy.text[:, None], greedy.codes], 1), frozen["greedy"].long())
    user = cases.USER[:1, :, : cases.SAMPLED_FRAMES]
    sampled = generate(net, user, sampling=Sampling(seed=cases.SEED))
    assert torch.equal(torch.cat([sampled.text[:, None], sampled.codes], 1), frozen["sampled"].long())


def test_frozen_persona_prompts(persona_folder):
    net, frozen = load(persona_folder), load_file(FROZEN / "persona.safetensors")
    for name, codes in (("text_only", None), ("voice", cases.VOICE_CODES)):
        ours = generate(net, cases.PERSONA_USER, persona_prompt(cases.PROMPT_TOKENS, net.config, voice_codes=codes))
        assert torch.equal(torch.cat([ours.text[:, None], ours.codes], 1), frozen[name].long())
    assert not torch.equal(frozen["text_only"], frozen["voice"])
    assert torch.equal(frozen["stored_voice"], frozen["voice"])


# Streaming and generation


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 61, [20, 1, 40], [38, 23], [61]])
def test_streaming_equals_the_whole(net, pieces):
    """Also beyond the context of 40 columns, where the ring of keys and values closes."""
    x = net.embed(net.columns(cases.CODES))
    cache = KVCache(net, 2, x.shape[1])
    streamed = torch.cat([net.temporal(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    whole = net.temporal(x)
    assert cache.rings[0].shape[3] == KYUTAI.context
    assert (streamed - whole).abs().max() <= 5e-5  # of values around 1: products of one row add up in another order
    with pytest.raises(EqknobsError, match="61 columns"):
        net.temporal(x[:, :1], cache)


@torch.no_grad()
def test_context_is_a_band(net):
    """A column sees the 39 before it, no more; over three layers that reaches 117 back."""
    codes = torch.cat([cases.CODES] * 3, dim=2)
    other = codes.clone()
    other[:, 1:, 0] = (other[:, 1:, 0] + 5) % 2048  # enters columns 1 and 2
    x, y = (net.embed(net.columns(c)) for c in (codes, other))
    differs = (net.temporal(x) != net.temporal(y)).any(-1).any(0).nonzero()[:, 0]
    assert differs[0] == 1 and 40 < differs[-1] <= 2 + 3 * 39


def test_rows_of_a_batch_are_independent(net):
    user = cases.USER[:, :, :12]
    for sampling in (Sampling(seed=5), Sampling(temperature=0, text_temperature=0)):
        both = generate(net, user, sampling=sampling)
        for row in range(2):
            seeded = Sampling(**{**vars(sampling), "seed": sampling.seed + row})
            alone = generate(net, user[row : row + 1], sampling=seeded)
            assert torch.equal(alone.codes[0], both.codes[row]) and torch.equal(alone.text[0], both.text[row])
    again = generate(net, user, sampling=Sampling(seed=5))
    assert torch.equal(again.codes, generate(net, user, sampling=Sampling(seed=5)).codes)
    assert not torch.equal(again.codes, generate(net, user, sampling=Sampling(seed=6)).codes)


def test_generation_hears_the_user_and_ends(net):
    user = cases.USER[:1, :, :8]
    changed = user.clone()
    changed[:, 0, 4] = (changed[:, 0, 4] + 1) % 2048
    one, other = generate(net, user), generate(net, changed)
    assert torch.equal(one.codes[..., :4], other.codes[..., :4]) and not torch.equal(one.codes, other.codes)
    # Frame 4 of the user is heard when frame 5 of the agent is chosen, but for frame 4's own delayed codes.
    assert torch.equal(one.codes[:, 0, 4], other.codes[:, 0, 4])
    dialogue = Dialogue(net, frames=1)
    dialogue.step(user[:, :, 0])
    with pytest.raises(EqknobsError, match="no frame left"):
        dialogue.step(user[:, :, 1])
    with pytest.raises(EqknobsError, match=r"\[batch, 8, frames\]"):
        generate(net, user[:, :5])


# Within the context of 40 columns, and beyond it; there not sampled, as rounding (1e-6 of a logit) may decide.
@pytest.mark.parametrize(("frames", "sampling"), [(12, GREEDY), (12, Sampling(seed=5)), (40, GREEDY)])
def test_a_batch_with_one_prompt_a_row_equals_one_by_one_generation(net, frames, sampling):
    user = torch.cat([cases.USER, cases.USER.flip(0)])[:, :, :frames]
    ring = torch.arange(68).view(17, 4)
    prompts = [
        Prompt(),
        persona_prompt([7, 9, 11], net.config, voice_codes=cases.VOICE_CODES[:, :9]),
        persona_prompt([8], net.config),
        persona_prompt([10, 9], net.config, voice=Voice(torch.randn(5, net.config.dim) / 3, ring)),
    ]
    batch = generate(net, user, prompts, sampling)
    for row, prompt in enumerate(prompts):
        seeded = Sampling(**{**vars(sampling), "seed": sampling.seed + row})
        alone = generate(net, user[row : row + 1], prompt, seeded)
        assert torch.equal(alone.codes[0], batch.codes[row]) and torch.equal(alone.text[0], batch.text[row])
    assert not torch.equal(batch.codes[0], generate(net, user, prompts[1], sampling).codes[0])
    with pytest.raises(EqknobsError, match="one for each of 4 rows; got 3"):
        generate(net, user, prompts[1:], sampling)


@pytest.mark.parametrize("dep_q", [4, 8])
def test_codebooks_codes_and_sounds_come_from_the_config(tmp_path, dep_q):
    small = MoshiConfig(
        **{"dim": 32, "layers": 2, "heads": 2, "hidden": 64, "dep_dim": 16, "dep_layers": 1, "dep_heads": 2},
        **{"dep_hidden": 32, "text_card": 20, "card": 50, "codebooks": 4, "delays": (0, 0, 1, 1, 1, 0, 1, 1, 1)},
        **{"silence": (1, 2, 3, 4), "sine": (5, 6, 7, 8)},
    )
    torch.manual_seed(0)
    net = MoshiNet(small)
    save_net(net, tmp_path / "small")
    loaded = load_net(find_files("small", str(tmp_path / "small")))
    assert loaded.config == small
    user = torch.randint(50, (2, 4, 6))
    reply = generate(loaded, user, persona_prompt([5], small))
    assert reply.codes.shape == (2, 4, 6) and reply.codes.max() < 50
    assert sum(p.numel() for p in loaded.parameters()) == sum(n for _, _, n, _ in parameters(small, (2, 2)))
    assert torch.equal(reply.codes, generate(net.eval(), user, persona_prompt([5], small)).codes)
    raw = raw_config(small) | {"dep_q": dep_q, "eqknobs": {"silence": [1, 2, 3, 4], "sine": [5, 6, 7, 8]}}
    assert read_config(raw, {}, "here") == small


def test_prompt_layout():
    prompt = persona_prompt([7, 9], KYUTAI, voice_codes=cases.VOICE_CODES)
    frames = prompt.frames
    assert frames.shape == (17, 20 + 6 + 2 + 6 - 1)
    assert frames[0].tolist() == [3] * 25 + [7, 9] + [3] * 6
    assert torch.equal(frames[KYUTAI.agent, :19], cases.VOICE_CODES[:, 1:])
    assert frames[KYUTAI.agent, 19:].T.tolist() == [list(PERSONA_SILENCE)] * 14
    assert frames[KYUTAI.user].T.tolist() == [list(PERSONA_SINE)] * 33
    assert system_text(" be kind ") == "<system> be kind <system>" == system_text("<system> be kind <system>")
    voice = Voice(torch.zeros(5, 4), torch.zeros(17, 4, dtype=torch.long))
    assert persona_prompt(None, KYUTAI, voice=voice).frames.shape == (17, 12)
    with pytest.raises(EqknobsError, match="not both"):
        persona_prompt(None, KYUTAI, voice, cases.VOICE_CODES)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    "state",
    [
        {"embeddings": torch.zeros(5, 1, 1, 255), "cache": torch.zeros(1, 17, 4)},
        {"embeddings": torch.zeros(5, 1, 1, 256), "cache": torch.zeros(1, 17, 5)},
        {"embeddings": torch.zeros(5, 1, 1, 256)},
        [1, 2],
        Evil(),
        None,
    ],
)
def test_bad_voices(tmp_path, state, capsys):
    path = tmp_path / "voice.pt"
    if state is not None:
        torch.save(state, path)
    with pytest.raises(EqknobsError, match=r"voice\.pt: not a voice of this model.*\[n, 1, 1, 256\]"):
        load_voice(path, KYUTAI)
    assert "run" not in capsys.readouterr().out


# Interventions


SINGLE_SCALES = [None, Nf4(double=False), Nf4(ALL_LINEARS, double=False)]


@torch.no_grad()
def streamed(net):
    """Text logits of 12 columns that go through the cache one by one."""
    cache = KVCache(net, 2, 12)
    return torch.cat([net.step(column, cache)[1] for column in net.columns(cases.CODES)[:, :, :12].unbind(-1)])


@pytest.mark.parametrize("nf4", SINGLE_SCALES)
def test_zeroed_equals_removed(folder, nf4):
    """But for rounding: a product without the zeros adds up in an order of its own, which is the BLAS kernel's choice.

    Logits are up to 5; such orders moved them by up to 6e-6.
    """
    net = load(folder, nf4=nf4)
    assert is_packed(net.layers[0].self_attn.in_proj) == (nf4 is not None)
    before, kept = logits(net), weight_of(net.layers[0].self_attn.out_proj).clone()
    with zeroed_heads(net, LOST):
        zeroed, zeroed_stream = logits(net), streamed(net)
    assert torch.equal(logits(net), before)  # reversible
    assert (zeroed - before).abs().max() > 0.1
    remove_heads(net, LOST)
    assert net.heads == ((0, 3), (), (0, 1, 2))
    assert torch.equal(weight_of(net.layers[0].self_attn.out_proj), kept.view(-1, 4, 64)[:, [0, 3]].flatten(1))
    assert (logits(net) - zeroed).abs().max() <= 3e-5
    assert (streamed(net) - zeroed_stream).abs().max() <= 3e-5
    cache = KVCache(net, 1, 9)
    assert [ring.shape[2] for ring in cache.rings] == [2, 0, 3]


@torch.no_grad()
@pytest.mark.parametrize("nf4", SINGLE_SCALES)
def test_zeroed_equals_removed_bit_for_bit_in_whole_numbers(folder, nf4):
    """Sums of whole numbers below 2^24 are exact in any order, and one column's attention is its value.

    Weights are -1, 0 and 1, which NF4 holds exactly.
    """
    net, random = load(folder, nf4=nf4), torch.Generator().manual_seed(0)
    for layer in (0, 2):
        attention = net.layers[layer].self_attn
        for name in ("in_proj", "out_proj"):
            weight = torch.randint(-1, 2, weight_of(getattr(attention, name)).shape, generator=random).float()
            setattr(attention, name, with_weight(getattr(attention, name), weight))
            assert torch.equal(weight_of(getattr(attention, name)), weight)
    x = torch.randint(-3, 4, (5, 1, KYUTAI.dim), generator=random).float()
    rotation = torch.ones(1, 1, 1, KYUTAI.head_dim // 2, dtype=torch.complex64)

    def run(layer):
        return net.layers[layer].self_attn(x, rotation, None, None, layer)

    whole = [run(layer) for layer in (0, 2)]
    with zeroed_heads(net, LOST):
        zeroed = [run(layer) for layer in (0, 2)]
    remove_heads(net, LOST)
    for layer, before, lost in zip((0, 2), whole, zeroed):
        assert torch.equal(lost, lost.round()) and 50 < lost.abs().max() < 2**24
        assert not torch.equal(before, lost) and torch.equal(run(layer), lost)


def test_heads_keep_their_numbers(folder):
    at_once, one_by_one = load(folder), load(folder)
    remove_heads(at_once, {0: [0, 2]})
    remove_heads(one_by_one, {0: [0]})
    remove_heads(one_by_one, {0: [2]})
    assert at_once.heads[0] == one_by_one.heads[0] == (1, 3)
    assert torch.equal(logits(at_once), logits(one_by_one))
    with pytest.raises(EqknobsError, match=r"layer 0 has no head 2 .*\[1, 3\]"):
        remove_heads(one_by_one, {0: [2]})
    with pytest.raises(EqknobsError, match="no layer 7"), zeroed_heads(one_by_one, {7: [0]}):
        pass
    assert torch.equal(logits(at_once), logits(one_by_one))


@pytest.mark.parametrize("nf4", [None, Nf4(), Nf4(ALL_LINEARS, double=False)])
def test_save_and_load(folder, tmp_path, nf4):
    net = load(folder, nf4=nf4)
    remove_heads(net, LOST)
    prune(net, 0.3, ["transformer.layers.2.gating.*"])
    save_net(net, tmp_path / "saved", folder / TOKENIZER)
    again = load(tmp_path / "saved")
    assert again.heads == net.heads and again.config == net.config
    ours, theirs = net.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert any("quant_state" in key for key in ours) == (nf4 is not None)
    assert torch.equal(logits(net), logits(again))
    assert find_files("m", str(tmp_path / "saved")).tokenizer.name == TOKENIZER
    remove_heads(again, {0: [3]})
    assert again.heads[0] == (0,)


def test_packing_is_bitsandbytes_own(folder):
    functional = bitsandbytes().functional

    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    for double in (False, True):
        data, state = pack(weight, Nf4(double=double), torch.float32)
        wanted, its = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double, blocksize=64)
        assert torch.equal(data, wanted) and torch.equal(state.absmax, its.absmax)
        assert torch.equal(functional.dequantize_4bit(data, state), functional.dequantize_4bit(wanted, its))
    with pytest.raises(EqknobsError, match="do not divide"):
        pack(torch.zeros(3, 5), Nf4(), torch.float32)


def test_packing_in_pieces(monkeypatch):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    whole = pack(weight, Nf4(), torch.bfloat16)
    monkeypatch.setattr("eqknobs.models.moshi.quantise._PIECE", 1000)
    pieces = pack(weight, Nf4(), torch.bfloat16)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1].absmax, pieces[1].absmax)


def test_packed_weights_survive_use(folder):
    """bitsandbytes repacks weights in place on some CPUs when they are first used; here they stay what they are."""
    net = load(folder, nf4=Nf4())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    logits(net)
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    full = load(folder)
    assert 0.01 < (logits(net) - logits(full)).abs().mean() < 0.5
    covered = [name for name in linears(full, ALL_LINEARS) if is_packed(net.get_submodule(name))]
    assert covered == linears(full) and len(covered) == 4 * 3


@pytest.mark.parametrize("nf4", [None, Nf4(double=False)])
def test_pruning(folder, nf4):
    net = load(folder, nf4=nf4)
    name = "transformer.layers.0.gating.linear_in"
    before = weight_of(net.get_submodule(name)).clone()
    shares = prune(net, 0.4, [name, "transformer.layers.1.*"])
    after = weight_of(net.get_submodule(name))
    zero = after == 0
    assert len(shares) == 5 and abs(shares[name] - 0.4) < 1e-4
    assert int(zero.sum()) == round(0.4 * zero.numel())
    assert before[zero].abs().max() <= before[~zero].abs().min()
    assert torch.equal(after[~zero], before[~zero])
    # the mask outlives packing and packing once more
    for _ in range(2):
        data, state = pack(weight_of(net.get_submodule(name)), Nf4(), torch.float32)
        repacked = bitsandbytes().functional.dequantize_4bit(data, state)
        assert (repacked[zero] == 0).all()
    attention = net.layers[1].self_attn
    rows = (weight_of(attention.in_proj) == 0).view(3, 4, 64, -1)[:, [0, 1, 3]]
    remove_heads(net, {1: [2]})
    assert torch.equal(weight_of(net.layers[1].self_attn.in_proj) == 0, rows.flatten(0, 2))
    with pytest.raises(EqknobsError, match="0 to 1"):
        prune(net, 1.5)
    with pytest.raises(EqknobsError, match="no linear matches"):
        prune(net, 0.5, ["layers.*"])


def test_fake_quantisation(folder):
    net, name = load(folder), "transformer.layers.1.self_attn.out_proj"
    before = {n: weight_of(net.get_submodule(n)).clone() for n in linears(net)}
    fake_quantise(net, 4, 32, ["transformer.layers.1.*"])
    weight, old = weight_of(net.get_submodule(name)).unflatten(1, (-1, 32)), before[name].unflatten(1, (-1, 32))
    scale = old.abs().amax(-1, keepdim=True) / 7
    levels = weight / scale
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.abs().max() < 7.001
    assert ((weight - old).abs() <= scale / 2 * 1.001).all()
    changed = {n for n in before if not torch.equal(before[n], weight_of(net.get_submodule(n)))}
    assert changed == set(linears(net, ["transformer.layers.1.*"]))
    error = (logits(net) - logits(load(folder))).abs().mean()
    finer = load(folder)
    fake_quantise(finer, 8, 32, ["transformer.layers.1.*"])
    assert (logits(finer) - logits(load(folder))).abs().mean() < error / 4
    for bits, block, message in ((1, 64, "2 to 16"), (4, 60, "do not divide")):
        with pytest.raises(EqknobsError, match=message):
            fake_quantise(net, bits, block)
    with pytest.raises(EqknobsError, match="packed in NF4"):
        fake_quantise(load(folder, nf4=Nf4()), 4)


def test_masked_streams(net):
    before = logits(net)
    codes = cases.CODES[:, :, :24].clone()
    with masked_streams(net, [0, 4, 12]):
        masked = net(codes, depformer=False).text
    columns = net.columns(codes)
    columns[:, [0, 4, 12]] = -1
    assert torch.equal(masked, net.text_linear(net.temporal(net.embed(columns[:, :, :-1]))))
    assert torch.equal(logits(net), before)
    with pytest.raises(EqknobsError, match=r"0 \(text\) to 16"), masked_streams(net, [17]):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("nf4", [None, Nf4(), Nf4(ALL_LINEARS, double=False)])
def test_on_a_gpu(folder, tmp_path, nf4):
    def on_gpu(net):
        return net(cases.CODES[:, :, :24].cuda(), depformer=False).text.float().cpu()

    net, wanted = load(folder, nf4=nf4, device="cuda"), load(folder, nf4=nf4)(cases.CODES[:, :, :24]).text
    assert (on_gpu(net) - wanted).abs().max() < 1e-2
    with zeroed_heads(net, LOST):
        zeroed = on_gpu(net)
    remove_heads(net, LOST)
    assert (on_gpu(net) - zeroed).abs().max() < (1e-3 if nf4 is None or not nf4.double else 0.5)
    save_net(net, tmp_path / "saved")
    assert torch.equal(on_gpu(load(tmp_path / "saved", device="cuda")), on_gpu(net))
    net = load(folder, nf4=nf4, device="cuda", dtype=torch.bfloat16)
    reply = generate(net, cases.USER[:, :, :20], persona_prompt([5, 6], net.config), Sampling(seed=1))
    assert reply.codes.is_cuda and reply.codes.shape == (2, 8, 20) and reply.codes.min() >= 0


# Files


def test_config_from_file_and_from_shapes(persona_folder, net):
    assert net.config == KYUTAI
    assert read_config(raw_config(KYUTAI), {}, "here") == KYUTAI
    persona = load(persona_folder)
    assert (persona.config.heads, persona.config.head_dim, persona.config.dep_heads) == (2, 128, 1)
    tensors = hub_tensors(persona.config, 16, seed=2)
    for name in ("in", "out"):  # the first 8 steps' rows
        stacked = tensors[f"depformer.layers.1.self_attn.{name}_proj" + ("_weight" if name == "in" else ".weight")]
        projections = getattr(persona.depformer["layers"][1].self_attn, f"{name}_projs")
        assert torch.equal(torch.cat([p.weight for p in projections]), stacked.float()[: len(stacked) // 2])


def broken(folder: Path, tmp_path: Path, change) -> MoshiFiles:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors, raw = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    change(tensors, raw)
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(raw))
    return find_files("moshi", str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("transformer.layers.1.norm1.alpha"), "no tensor transformer.layers.1.norm1.alpha"),
        (lambda t, _: t.pop("transformer.layers.1.self_attn.in_proj_weight"), "no tensor .*layers.1.self_attn.in_proj"),
        (lambda t, _: t.pop("depformer.layers.0.gating.7.linear_in.weight"), "no tensor .*gating.7.linear_in"),
        (lambda t, _: t.update(surprise=torch.zeros(1)), "unknown tensor surprise"),
        (lambda t, _: t.update({"out_norm.alpha": torch.zeros(1, 1, 8)}), r"out_norm.alpha is \[1, 1, 8\]"),
        (
            lambda t, _: t.update({"depformer.layers.0.self_attn.in_proj_weight": torch.zeros(64, 64)}),
            r"is \[64, 64\], but config.json makes it \[1536, 64\]",
        ),
        (lambda _, raw: raw.update(num_heads=3), "heads must divide"),
        (lambda _, raw: raw.update(n_q=15), "n_q 15 and dep_q 8, supported are two speakers"),
        (lambda _, raw: raw.update(card=512), "eqknobs.silence and eqknobs.sine must be 8 codes below 512"),
        (lambda _, raw: raw.update(eqknobs={"silence": [1, 2]}), "must be 8 codes below 2048"),
        (lambda _, raw: raw.update(conditioners={"speaker": {}}), "conditioners"),
        (lambda _, raw: raw.update(delays=[0, 2]), "delays"),
        (lambda _, raw: raw.pop("num_layers"), "KeyError: 'num_layers'"),
        (lambda t, raw: (raw.clear(), t.pop("text_emb.weight")), "neither config.json nor the tensors"),
    ],
)
def test_broken_checkpoints(folder, tmp_path, change, message):
    with pytest.raises(EqknobsError, match=message):
        load_net(broken(folder, tmp_path, change))


def test_broken_packed_checkpoint(folder, tmp_path):
    save_net(load(folder, nf4=Nf4()), tmp_path / "packed")
    for change, message in (
        (lambda t, _: t.pop("transformer.layers.0.self_attn.in_proj.weight.absmax"), "in_proj.weight are not whole"),
        (lambda _, raw: raw["eqknobs"].update(heads=[[0]]), "for each of 3 layers, which of 4 heads"),
        (lambda _, raw: raw["eqknobs"].update(heads=[0, 1, 2]), "for each of 3 layers, which of 4 heads"),
        (lambda _, raw: raw["eqknobs"].update(heads=[[0], [4], [2]]), "for each of 3 layers, which of 4 heads"),
        (lambda _, raw: raw["eqknobs"].update(heads=[[1, 0], [1], [2]]), "for each of 3 layers, which of 4 heads"),
        (lambda _, raw: raw.update(eqknobs=[]), "for each of 3 layers, which of 4 heads"),
        (lambda _, raw: raw.update(moshi_name=None), "is not a Moshi config"),
        (lambda _, raw: raw.update(tokenizer_name=3), "is not a Moshi config"),
        (lambda _, raw: raw["eqknobs"].update(heads=[[0], [1], [2]]), r"in_proj.weight is \[768, 256\]"),
    ):
        with pytest.raises(EqknobsError, match=message):
            load_net(broken(tmp_path / "packed", tmp_path, change))
        shutil.rmtree(tmp_path / "copy")


def test_missing_files(folder, tmp_path, monkeypatch):
    with pytest.raises(EqknobsError, match=r"no folder \./nowhere"):
        find_files("moshi", "./nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(EqknobsError, match="not abc"):
        find_files("moshi", str(copy), "abc")
    (copy / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(EqknobsError, match="fetch it again"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(EqknobsError, match="no weights"):
        find_files("moshi", str(copy))


def test_hub_errors(monkeypatch):
    import httpx2
    from huggingface_hub.errors import GatedRepoError

    def gated(*_args, **_kwargs):
        raise GatedRepoError("403", response=httpx2.Response(403, request=httpx2.Request("GET", "https://hub")))

    monkeypatch.setattr("eqknobs.models.moshi.checkpoint.hf_hub_download", gated)
    with pytest.raises(
        EqknobsError, match=r"gated: accept the licence at https://huggingface\.co/nvidia/personaplex-7b-v1"
    ):
        find_files("personaplex", "nvidia/personaplex-7b-v1")

    def offline(*_args, **_kwargs):
        raise OSError("no network\nmore")

    monkeypatch.setattr("eqknobs.models.moshi.checkpoint.hf_hub_download", offline)
    with pytest.raises(EqknobsError, match=r"cannot get config.json of 'a/b'.*OSError: no network\)"):
        find_files("m", "a/b")


def test_an_early_hub_revision_without_a_config_is_read_by_its_shapes(persona_folder, tmp_path, monkeypatch):
    import httpx2
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def download(_repo, file, revision=None):
        path = persona_folder / file
        if file == "config.json":
            request = httpx2.Request("GET", "https://hub")
            raise RemoteEntryNotFoundError("404", response=httpx2.Response(404, request=request))
        return str(path)

    monkeypatch.setattr("eqknobs.models.moshi.checkpoint.hf_hub_download", download)
    files = find_files("m", "kyutai/moshiko-pytorch-bf16")
    assert files.config is None and files.revision == persona_folder.name
    assert load_net(files).config == load(persona_folder).config


# The Model protocol


def config_of(folder, codec, **more):
    return {"name": "moshi", "kind": "moshi", "path": str(folder), "device": "cpu", "codec": str(codec)} | more


@pytest.fixture(scope="module")
def model(folder, codec):
    return load_model(config_of(folder, codec))


def clip(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 24000))).astype(np.float32)


def test_activations(model):
    wav = clip(1.03)
    frames = model.frames(len(wav), "residual.1")
    assert frames == 13 and model.site("heads.2").width == 256 and model.site("residual.0").frame_rate == 12.5
    seen = model.encode_sites(wav, ["residual.1", "heads.2", "heads.0", "embeddings"])
    assert {name: acts.shape for name, acts in seen.items()} == dict.fromkeys(seen, (13, 256))
    assert all(acts.dtype == np.float32 for acts in seen.values())
    for name, acts in seen.items():
        np.testing.assert_array_equal(model.encode(wav, name), acts)
    # against the network by hand: the last layer's heads through its output projection give the residual's update
    columns = model.net.columns(model.grid(wav))
    assert columns[0, 0].tolist() == [KYUTAI.text_card] + [3] * 13
    assert columns[0, KYUTAI.agent, 2:].T.tolist() == [list(PERSONA_SILENCE)] * 12
    np.testing.assert_array_equal(columns[0, 9, 1:], model.codes(wav)[0])
    np.testing.assert_array_equal(columns[0, 10, 2:], model.codes(wav)[1, :-1])
    states = []
    hook = model.net.layers[1].register_forward_hook(lambda _m, _i, out: states.append(out))
    model.net.temporal(model.net.embed(columns))
    hook.remove()
    np.testing.assert_array_equal(seen["residual.1"], states[0][0, 1:])
    assert not model.net.layers[1]._forward_hooks


@pytest.mark.parametrize("site", ["residual.1", "heads.1"])
def test_edited_sites(model, site):
    """While it listens and while it answers, the network goes on from the edit."""
    wav, layer = clip(0.8, 3), model.net.layers[1]
    read = ["residual.0", site, "residual.2"]
    plain, before = model.converse(wav), model.encode_sites(wav, read)

    def change(acts):
        return 1.5 * acts + 0.3

    if site == "residual.1":
        hook = layer.register_forward_hook(lambda _m, _i, acts: change(acts))
    else:
        hook = layer.self_attn.out_proj.register_forward_pre_hook(lambda _m, inputs: (change(inputs[0]),))
    expected, heard = model.converse(wav), model.encode_sites(wav, read)
    hook.remove()
    with model.editing(site, change):
        ours, seen = model.converse(wav), model.encode_sites(wav, read)
    assert torch.equal(ours.codes, expected.codes) and not torch.equal(ours.codes, plain.codes)
    for name in read:
        np.testing.assert_array_equal(seen[name], heard[name])
        assert np.array_equal(seen[name], before[name]) == (name == "residual.0")
    np.testing.assert_allclose(seen[site], 1.5 * before[site] + 0.3, atol=1e-4)
    assert torch.equal(model.converse(wav).codes, plain.codes)


def test_edited_embeddings_are_what_the_first_layer_reads(model):
    wav = clip(0.5, 3)
    before = model.encode_sites(wav, ["embeddings", "residual.0"])
    with model.editing("embeddings", lambda acts: 0 * acts):
        silenced = model.encode_sites(wav, ["embeddings", "residual.0"])
    assert not silenced["embeddings"].any() and before["embeddings"].any()
    assert not np.array_equal(silenced["residual.0"], before["residual.0"])


def test_a_turn_is_in_one_stream_and_carries_the_monologue(model):
    codes, config = model.codes(clip(0.5)), model.config
    text = torch.arange(10, 10 + codes.shape[1])
    for stream, other, said in ((config.user, config.agent, None), (config.agent, config.user, text)):
        grid = model.turn(codes, "agent" if stream == config.agent else "user", said)[0]
        assert torch.equal(grid[stream], codes) and grid[other].T.tolist() == [list(config.silence)] * codes.shape[1]
        assert torch.equal(grid[0], torch.full_like(text, config.pad) if said is None else said)
    heard = model.activations(model.turn(codes, "user"), ["residual.2"])["residual.2"]
    np.testing.assert_array_equal(heard, model.encode(clip(0.5), "residual.2"))


def test_a_random_network_has_the_shapes_and_scales_and_nothing_else(folder, codec, model):
    other = load_model(config_of(folder, codec))
    randomise(other.net, 0)
    for name, weight in model.net.named_parameters():
        drawn = other.net.get_parameter(name)
        temporal = name.startswith(("emb.", "text_emb", "transformer.")) and "norm" not in name
        assert drawn.shape == weight.shape and torch.equal(drawn, weight) != temporal, name
        if temporal:
            assert 0.9 < drawn.std() / weight.std() < 1.1
            assert abs(np.corrcoef(drawn.flatten(), weight.flatten())[0, 1]) < 0.05
    again = load_model(config_of(folder, codec))
    randomise(again.net, 0)
    assert torch.equal(again.net.text_emb.weight, other.net.text_emb.weight)
    packed = load_model(config_of(folder, codec, dtype="bfloat16", nf4=True))
    before = weight_of(packed.net.layers[0].gating.linear_in).clone()
    randomise(packed.net, 0)
    linear = packed.net.layers[0].gating.linear_in
    assert is_packed(linear) and not torch.equal(weight_of(linear), before)


def test_monologue():
    said = monologue([[10], [11, 12], [13], [14]], [-1, 3, 4, 20], 8, KYUTAI)
    pad, epad = KYUTAI.pad, KYUTAI.epad
    assert said.tolist() == [10, pad, epad, 11, 12, 13, pad, pad]  # no room before a word: no EPAD; none behind the end


def test_edited_sites_that_are_not_there(model):
    for site in ("residual.3", "heads.9", "encoder.0", "residual"):
        with pytest.raises(EqknobsError, match="no site"), model.editing(site, lambda acts: acts):
            pass
        with pytest.raises(EqknobsError, match="no site"), editing(model.net, site, lambda acts: acts):
            pass
    with (
        pytest.raises(EqknobsError, match=r"edit at heads\.0 turned"),
        model.editing("heads.0", lambda acts: acts[..., 1:]),
    ):
        model.encode(clip(0.3), "residual.0")


def test_a_cache_says_which_codec_made_the_codes(folder, codec, tmp_path):
    """Otherwise work that was begun with another codec, under the same path, would be gone on with."""
    sf.write(tmp_path / "a.wav", clip(0.5), 24000)
    row = f"a,{tmp_path}/a.wav,s,train,{file_sha256(tmp_path / 'a.wav')}"
    (tmp_path / "manifest.csv").write_text(f"id,path,speaker,split,sha256\n{row}\n")
    cache_activations(tmp_path / "manifest.csv", tmp_path / "a.h5", config_of(folder, codec), "residual.0", {})
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["codec_revision"] == weights_hash([codec / "model.safetensors"])
        assert file.attrs["revision"] == weights_hash([folder / "model.safetensors"])


def test_a_frame_depends_on_the_past_only(model):
    wav, longer = clip(0.8), clip(1.6)
    longer[: len(wav)] = wav
    short, long = (model.encode(w, "residual.2") for w in (wav, longer))
    assert len(short) == 10 and len(long) == 20
    np.testing.assert_allclose(long[:10], short, atol=1e-4)


def test_agent_stream(folder, codec, model):
    speaking = load_model(config_of(folder, codec, stream="agent"))
    wav = clip(0.5)
    grid = speaking.grid(wav)
    assert torch.equal(grid[0, KYUTAI.agent], speaking.codes(wav))
    assert grid[0, KYUTAI.user, 0].tolist() == list(PERSONA_SINE)
    assert np.abs(speaking.encode(wav, "residual.0") - model.encode(wav, "residual.0")).max() > 0.1


def test_options_and_errors(folder, codec, model, tmp_path):
    packed = load_model(config_of(folder, codec, dtype="bfloat16", nf4={"linears": ["transformer.*"], "double": False}))
    assert packed.net.dtype == torch.bfloat16 and is_packed(packed.net.layers[0].gating.linear_in)
    wav = clip(0.5)
    ours, theirs = packed.encode(wav, "residual.0"), model.encode(wav, "residual.0")
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9
    remove_heads(packed.net, {1: [0, 1, 2, 3]})
    assert packed.site("heads.0").width == 256
    with pytest.raises(EqknobsError, match=r"no site .heads\.1."):
        packed.encode(wav, "heads.1")
    for more, message in (
        ({"stream": "both"}, "user or agent"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
        ({"nf4": {"bits": 3}}, "nf4: no option bits"),
        ({"nf4": {"linears": ["transformer.*", "layers.*"]}}, "no linear matches 'layers"),
    ):
        with pytest.raises(EqknobsError, match=message):
            load_model(config_of(folder, codec, **more))
    assert Nf4.of({}) == Nf4.of(True) == Nf4() and Nf4.of(False) is Nf4.of(None) is None
    with pytest.raises(EqknobsError, match=r"no site 'residual\.3'"):
        model.encode(wav, "residual.3")
    with pytest.raises(EqknobsError, match="cannot turn activations back"):
        model.decode(ours, "residual.0", 100)
    bundled = ROOT / "resources/models/tiny-mimi"
    with pytest.raises(EqknobsError, match=r"moshi.codec: the model reads codes of 2048"):
        load_model(config_of(folder, bundled))
    (copy := tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, copy / name)
    with pytest.raises(EqknobsError, match=r"no tokenizer_\*\.model"):
        load_model(config_of(copy, codec)).prompt("be kind")


def test_loudness_is_the_standards():
    """ITU-R BS.1770-4: a full-scale sine of 997 Hz has -3.01; blocks 10 below the level of the others do not count."""
    times = np.arange(5 * 24000) / 24000
    sine = np.sin(2 * np.pi * 997 * times)
    assert abs(loudness(sine, 24000) + 3.01) < 0.01
    assert abs(loudness(np.concatenate([sine, 0.01 * sine, 0 * sine]), 24000) + 3.01) < 0.2
    assert loudness(np.concatenate([sine, 0.5 * sine]), 24000) < -4  # these do
    assert abs(loudness(normalised(sine, 24000), 24000) + 24) < 0.001
    assert np.array_equal(normalised(np.zeros(24000), 24000), np.zeros(24000))


def test_conversation(persona_folder, codec, tmp_path):
    model = load_model(config_of(persona_folder, codec))
    tokens = model.tokeniser().encode("<system> good morning <system>")
    assert model.prompt("good morning").frames[0, 5 : 5 + len(tokens)].tolist() == tokens
    assert model.prompt().columns == 1
    spoken = model.prompt("good morning", clip(0.4))
    assert spoken.frames.shape[1] == 5 + 6 + len(tokens) + 6 - 1
    # a recorded voice is brought to one level: 400 ms can be measured, less cannot
    assert torch.equal(model.prompt("hi", 4 * clip(0.4)).frames, model.prompt("hi", clip(0.4)).frames)
    assert not torch.equal(model.prompt("hi", 4 * clip(0.3)).frames, model.prompt("hi", clip(0.3)).frames)
    ring = cases.CODES[:1, :, :4]
    torch.save({"embeddings": torch.randn(9, 1, 1, 256), "cache": ring}, tmp_path / "v.pt")
    stored = model.prompt("good morning", tmp_path / "v.pt")
    assert stored.voice is not None and stored.frames.shape[1] == 6 + len(tokens) + 6
    wav = clip(0.8)
    replies = [model.converse(wav, prompt) for prompt in (model.prompt(), spoken, stored)]
    assert all(reply.codes.shape == (1, 8, 10) and reply.text.shape == (1, 10) for reply in replies)
    assert not torch.equal(replies[0].codes, replies[1].codes) and not torch.equal(replies[1].codes, replies[2].codes)
    sound = model.speech(replies[0].codes[0], len(wav))
    assert sound.shape == wav.shape and np.isfinite(sound).all() and sound.std() > 0
    hello = model.tokeniser().encode("good morning")
    assert model.monologue(torch.tensor([3, 3, *hello, 0, 3, KYUTAI.text_card])) == "good morning"
