"""Initial weights with which a small Moshi copies its prompt from the first step.

Trained from random weights, a model of this size finds out within minutes how to say the prompt's first word, and not
within an hour how to say the others (docs/tiny-moshi.md). What it lacks is an induction circuit (Olsson et al. 2022,
arXiv 2209.11895), so one is written into three heads; training goes on from there with all weights:

- layer 0, head 0: a column sees the token before it (in the prompt: which word came before this one);
- layer 0, head 1: a column sees the last word that was said, itself included;
- layer 1, head 0: a column looks for the word whose predecessor is the last word said, and brings it to the output.

Every text token has a code of 16 signs for this, two of which differ in at least 5. Nothing here is special to a
vocabulary; sizes: heads of 32 or more, dim of 128 or more, two layers.
"""

import math

import numpy as np
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.network import MoshiNet

BITS = 16
# places in the residual stream: one; 1 of words; then the codes of the token, of the one before, of the last word, and
# of what is to be said
ONE, WORD, TOKEN, BEFORE, LAST, SAY = 0, 1, *(2 + BITS * i for i in range(4))
PLACES = 2 + 4 * BITS
GAIN = 0.8  # of what the embeddings hold there, beside a norm of about 3 elsewhere


def codes(count: int) -> Tensor:
    """`count` codes [count, 16] of signs that differ in at least 5: the first of the lexicographic code."""
    found: list[int] = []
    for value in range(1 << BITS):
        if all((value ^ other).bit_count() >= 5 for other in found):
            found.append(value)
            if len(found) == count:
                bits = (np.array(found)[:, None] >> np.arange(BITS)) & 1
                return torch.from_numpy(2.0 * bits - 1).float()
    raise EqknobsError(f"copying: no more than {len(found)} codes of {BITS} signs; take fewer text tokens")


@torch.no_grad()
def write_copying(net: MoshiNet, first_word: int) -> None:
    """Write the circuit into new weights; text tokens from `first_word` on are words."""
    config = net.config
    if config.dim < PLACES + 32 or config.head_dim < 2 * BITS or config.layers < 2:
        raise EqknobsError("copying: the model is too small for the circuit: two layers, dim 128, heads of 32")
    code = codes(config.text_card)
    for embedding in net.emb:
        embedding.weight[:, :PLACES] = 0
    net.text_emb.weight[:, :PLACES] = 0
    net.text_emb.weight[:, ONE] = GAIN
    net.text_emb.weight[first_word : config.text_card, WORD] = GAIN
    net.text_emb.weight[: config.text_card, TOKEN : TOKEN + BITS] = GAIN * code
    net.text_linear.weight.mul_(0.1)
    net.text_linear.weight[:, SAY : SAY + BITS] = 0.2 * code
    for layer in net.layers:  # nothing else writes there at first
        layer.self_attn.out_proj.weight[:PLACES] = 0
        layer.gating.linear_out.weight[:PLACES] = 0

    pairs = config.head_dim // 2
    turn = torch.exp(torch.arange(pairs) * (-math.log(config.max_period) / pairs))  # radians a column, as in `network`
    near = turn > 0.015
    # normalised inputs: about 2.2 where there is GAIN
    query, key, *_ = _head(net, 0, 0, TOKEN, BEFORE)
    query[0::2, ONE], query[1::2, ONE] = 3.0 * turn.cos(), -3.0 * turn.sin()  # turned back by one column
    key[0::2, ONE] = 3.0
    query, key, *_ = _head(net, 0, 1, TOKEN, LAST)
    recent = 2.2 * near * torch.where(turn > 0.9, 0.55, 1.0)
    query[0::2, ONE], key[0::2, ONE] = recent, recent
    query[-2, ONE] = key[-2, WORD] = 5.0  # any word before any other token
    query, key, *_ = _head(net, 1, 0, TOKEN, SAY)
    slow = slice(config.head_dim - BITS, None)  # pairs that hardly turn over the length of a prompt
    query[slow, LAST : LAST + BITS] = key[slow, BEFORE : BEFORE + BITS] = 1.1 * torch.eye(BITS)
    query[config.head_dim - BITS - 2, ONE] = key[config.head_dim - BITS - 2, WORD] = 2.7


def _head(net: MoshiNet, layer: int, head: int, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Clear a head and let it carry a code from one place to another; returns query and key weights [head_dim, dim]."""
    attention, size = net.layers[layer].self_attn, net.config.head_dim
    width = size * net.config.heads
    rows = [attention.in_proj.weight[i * width + head * size : i * width + (head + 1) * size] for i in range(3)]
    for row in rows:
        row.zero_()
    places = torch.arange(BITS)
    rows[2][places, source + places] = 1.0
    out = attention.out_proj.weight[:, head * size : (head + 1) * size]
    out.zero_()
    out[target + places, places] = 0.35
    return rows[0], rows[1]
