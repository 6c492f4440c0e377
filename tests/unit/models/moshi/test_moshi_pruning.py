"""What pruning a speech LM rests on: likelihood of what was said, means and gradients of heads, layers, codebooks."""

import pytest
import torch

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.config import Nf4
from eqknobs.models.moshi.generate import GREEDY, Prompt, Voice, generate, persona_prompt
from eqknobs.models.moshi.interventions import (
    first_codebooks,
    linears,
    prune,
    pruned,
    remove_heads,
    skipped_layers,
    zeroed_heads,
)
from eqknobs.models.moshi.likelihood import Said, head_gradients, head_means, losses, nats
from helpers.moshi_world import KYUTAI, random_codes, write_kyutai

LOST = {0: [1, 2], 1: [0, 1, 2, 3], 2: [3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kyutai(tmp_path_factory.mktemp("moshi") / "kyutai")


def load(folder, **options):
    return load_net(find_files("moshi", str(folder)), **options)


@pytest.fixture(scope="module")
def net(folder):
    return load(folder)


def said(seed: int, frames: int = 9, prompt: Prompt | None = None) -> Said:
    codes = random_codes(1, frames, KYUTAI.text_card, seed)[0]
    return Said(prompt or Prompt(), codes[KYUTAI.user], codes[0], codes[KYUTAI.agent])


@pytest.fixture(scope="module")
def rows():
    """A row without prompt, one with text and a voice's codes, one with a `.pt` voice; none is as long as another."""
    codes = random_codes(1, 4, KYUTAI.text_card, 7)[0, KYUTAI.agent]
    voice = Voice(torch.randn(5, KYUTAI.dim, generator=torch.Generator().manual_seed(0)), random_codes(1, 4, 9)[0])
    return [
        said(1),
        said(2, 6, persona_prompt([5, 6, 7], KYUTAI, voice_codes=codes)),
        said(3, 8, persona_prompt([5], KYUTAI, voice=voice)),
    ]


@torch.no_grad()
def test_nats_are_those_of_the_teacher_forced_logits(net, rows):
    one = rows[0]
    grid = torch.cat([one.text[None], one.codes, one.user])[None]
    logits, found = net(grid), nats(net, [one])
    text = torch.nn.functional.cross_entropy(logits.text[0], one.text, reduction="none")
    torch.testing.assert_close(found.text[0], text)
    first = torch.nn.functional.cross_entropy(logits.audio[0, 0], one.codes[0], reduction="none")
    torch.testing.assert_close(found.audio[0, 0], first)
    late = torch.nn.functional.cross_entropy(logits.audio[0, 5, :-1], one.codes[5, :-1], reduction="none")
    torch.testing.assert_close(found.audio[0, 5, :-1], late)
    assert found.audio[0, 5, -1].isnan() and found.columns.sum() == 9


@torch.no_grad()
def test_rows_of_unlike_prompts_and_lengths_cost_what_they_cost_alone(net, rows):
    together = nats(net, rows)
    for i, row in enumerate(rows):
        alone, frames = nats(net, [row]), len(row.text)
        torch.testing.assert_close(together.text[i, :frames], alone.text[0], rtol=1e-4, atol=1e-5)
        audio = together.audio[i, :, :frames]
        torch.testing.assert_close(audio, alone.audio[0], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert together.text[i, frames:].isnan().all() and together.columns[i].sum() == frames
        assert losses(together)[i] == pytest.approx(losses(alone).item(), rel=1e-4)


@torch.no_grad()
def test_what_a_model_says_is_what_it_finds_likeliest(net, rows):
    user = torch.stack([row.user[:, :6] for row in rows])
    reply = generate(net, user, [row.prompt for row in rows], GREEDY)
    own = [Said(row.prompt, user[i], reply.text[i], reply.codes[i]) for i, row in enumerate(rows)]
    found = nats(net, own)
    for frame in range(6):
        for i, row in enumerate(own):
            text = row.text.clone()
            text[frame] = (text[frame] + 1) % KYUTAI.text_card
            assert nats(net, [row._replace(text=text)]).text[0, frame] > found.text[i, frame]
            codes = row.codes.clone()
            codes[:, frame] = (codes[:, frame] + 1) % KYUTAI.card
            other = nats(net, [row._replace(codes=codes)]).audio[0, 0, frame]
            assert other > found.audio[i, 0, frame]


@pytest.mark.parametrize("nf4", [None, Nf4()])
def test_gradients_are_slopes_of_the_loss(folder, rows, nf4):
    net = load(folder, nf4=nf4)
    found = head_gradients(net, [rows[:1], rows[1:]])
    alone = sum(head_gradients(net, [[row]]) for row in rows) / 3
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-6)
    size = 1e-2
    for layer, head in ((0, 2), (2, 1)):
        slopes = []
        for row in rows:
            values = []
            for gain in (1 - size, 1 + size):
                scale = torch.ones(KYUTAI.heads, 1)
                scale[head] = gain
                hook = net.layers[layer].self_attn.out_proj.register_forward_pre_hook(
                    lambda _m, inputs, scale=scale: ((inputs[0].unflatten(-1, (4, -1)) * scale).flatten(-2),)
                )
                values.append(losses(nats(net, [row])).item())
                hook.remove()
            slopes.append(abs(values[1] - values[0]) / (2 * size))
        assert found[layer, head].item() == pytest.approx(sum(slopes) / 3, rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("nf4", [None, Nf4(block=64, double=False)])
def test_heads_replaced_by_their_means_become_a_bias(folder, rows, tmp_path, nf4):
    net = load(folder, nf4=nf4)
    means, before = head_means(net, [rows]), nats(net, rows).text
    with zeroed_heads(net, LOST):
        zeroed = nats(net, rows).text
    with zeroed_heads(net, LOST, means):
        replaced = nats(net, rows).text
    torch.testing.assert_close(nats(net, rows).text, before, rtol=0, atol=0, equal_nan=True)
    assert (replaced - zeroed).nan_to_num().abs().max() > 0.01
    remove_heads(net, {0: [1], 1: [0, 3]}, means)  # in two goes: the biases add up
    remove_heads(net, {0: [2], 1: [1, 2], 2: [3]}, means)
    assert net.heads == ((0, 3), (), (0, 1, 2))
    torch.testing.assert_close(nats(net, rows).text, replaced, rtol=1e-4, atol=5e-5, equal_nan=True)
    save_net(net, tmp_path / "saved")
    again = load(tmp_path / "saved")
    torch.testing.assert_close(nats(again, rows).text, nats(net, rows).text, rtol=0, atol=0, equal_nan=True)
    remove_heads(again, {2: [1]})  # zeroed: the bias stays as it was
    assert torch.equal(again.layers[2].self_attn.bias, net.layers[2].self_attn.bias)


@torch.no_grad()
def test_means_are_of_the_dialogues_columns(net, rows):
    seen = {}
    hook = net.layers[1].self_attn.out_proj.register_forward_pre_hook(lambda _m, inputs: seen.update(x=inputs[0]))
    parts = []
    for row in rows:
        columns = nats(net, [row]).columns
        parts.append(seen["x"][columns])
    hook.remove()
    wanted = torch.cat(parts).mean(0).view(KYUTAI.heads, -1)
    torch.testing.assert_close(head_means(net, [rows[:2], rows[2:]])[1], wanted, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_skipped_layers_hand_on_what_they_get(net, rows):
    before = nats(net, rows).text
    with skipped_layers(net, range(KYUTAI.layers)):
        columns = net.columns(random_codes(1, 5, KYUTAI.text_card))
        x = net.embed(columns)
        assert torch.equal(net.temporal(x), net.out_norm(x))
    with skipped_layers(net, [1]):
        assert not torch.equal(nats(net, rows).text.nan_to_num(), before.nan_to_num())
    assert torch.equal(nats(net, rows).text.nan_to_num(), before.nan_to_num())
    with pytest.raises(EqknobsError, match="no layer 3"), skipped_layers(net, [3]):
        pass


@torch.no_grad()
def test_a_shorter_depformer_says_what_one_says_that_is_made_to_leave_codes_out(net, rows):
    user = rows[0].user[None]
    codes = torch.full((1, 8, user.shape[2]), -2)
    codes[:, 3:] = -1
    made = generate(net, user, codes=codes)
    with first_codebooks(net, 3):
        short = generate(net, user)
        assert net.steps == 3 and nats(net, rows).audio.shape[1] == 3
        assert net(random_codes(1, 5, KYUTAI.text_card)).audio.shape[1] == 3
    assert torch.equal(made.codes, short.codes) and torch.equal(made.text, short.text)
    assert (short.codes[:, 3:, :] == -1).all() and (short.codes[:, :3] >= 0).all() and net.steps == 8
    whole = generate(net, user)
    assert not torch.equal(whole.codes[:, :3], short.codes[:, :3])
    filled = generate(net, user, codes=torch.where(codes == -1, 5, codes))
    assert (filled.codes[:, 3:] == 5).all() and not torch.equal(filled.codes[:, :3], short.codes[:, :3])
    with pytest.raises(EqknobsError, match="codebooks: 1 to 8, got 9"), first_codebooks(net, 9):
        pass


@torch.no_grad()
@pytest.mark.parametrize("nf4", [None, Nf4()])
def test_pruned_weights_come_back(folder, rows, nf4):
    net, other = load(folder, nf4=nf4), load(folder, nf4=nf4)
    before = nats(net, rows).text
    prune(other, 0.5, ["transformer.layers.1.*"])
    with pruned(net, {1: 0.5, 2: 0.0}):
        assert torch.equal(nats(net, rows).text.nan_to_num(), nats(other, rows).text.nan_to_num())
    assert torch.equal(nats(net, rows).text.nan_to_num(), before.nan_to_num())
    assert linears(net) == linears(other)
