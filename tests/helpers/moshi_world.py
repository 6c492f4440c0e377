"""Tiny random Moshi checkpoints in the hub's own format: keys, shapes, file names.

Weights come from numpy's legacy generator, whose stream never changes, so that frozen oracle outputs stay valid.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from eqknobs.models.moshi.config import MoshiConfig, raw_config
from helpers.tiny_world import save_codec

TOKENIZER = "tokenizer_spm_32k_3.model"
KYUTAI = MoshiConfig(
    dim=256,
    layers=3,
    heads=4,
    hidden=352,
    dep_dim=64,
    dep_layers=2,
    dep_heads=4,
    dep_hidden=96,
    text_card=96,
    context=40,  # shorter than what tests generate
)
# What PersonaPlex's near-empty config leaves to the shapes: heads of 128 and 64, a context of 3000.
PERSONA = replace(KYUTAI, heads=2, dep_heads=1, context=3000)
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "you are a wise and friendly teacher who answers questions",
    "<system> you work for a bank and your name is jane <system>",
    "good morning how may i help you today",
)


def hub_layout(config: MoshiConfig, dep_q: int) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, mean and deviation of every tensor under kyutai's names; values large enough for all to matter."""

    def gating(name: str, dim: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
        yield f"{name}.linear_in.weight", (2 * hidden, dim), 0, dim**-0.5
        yield f"{name}.linear_out.weight", (dim, hidden), 0, hidden**-0.5

    for i in range(16):
        yield f"emb.{i}.weight", (config.card + 1, config.dim), 0, 0.25
    yield "text_emb.weight", (config.text_card + 1, config.dim), 0, 0.25
    yield "text_linear.weight", (config.text_card, config.dim), 0, config.dim**-0.5
    for layer in range(config.layers):
        stem = f"transformer.layers.{layer}"
        yield f"{stem}.self_attn.in_proj_weight", (3 * config.dim, config.dim), 0, 1.5 * config.dim**-0.5
        yield f"{stem}.self_attn.out_proj.weight", (config.dim, config.dim), 0, config.dim**-0.5
        yield f"{stem}.norm1.alpha", (1, 1, config.dim), 1, 0.2
        yield f"{stem}.norm2.alpha", (1, 1, config.dim), 1, 0.2
        yield from gating(f"{stem}.gating", config.dim, config.hidden)
    yield "out_norm.alpha", (1, 1, config.dim), 1, 0.2
    dim = config.dep_dim
    for i in range(dep_q):
        yield f"depformer_in.{i}.weight", (dim, config.dim), 0, config.dim**-0.5
        yield f"linears.{i}.weight", (config.card, dim), 0, 0.4 * dim**-0.5
    for i in range(dep_q - 1):
        yield f"depformer_emb.{i}.weight", (config.card + 1, dim), 0, 1.0
    yield "depformer_text_emb.weight", (config.text_card + 1, dim), 0, 1.0
    for layer in range(config.dep_layers):
        stem = f"depformer.layers.{layer}"
        yield f"{stem}.self_attn.in_proj_weight", (dep_q * 3 * dim, dim), 0, 1.5 * dim**-0.5
        yield f"{stem}.self_attn.out_proj.weight", (dep_q * dim, dim), 0, dim**-0.5
        yield f"{stem}.norm1.alpha", (1, 1, dim), 1, 0.2
        yield f"{stem}.norm2.alpha", (1, 1, dim), 1, 0.2
        for i in range(dep_q):
            yield from gating(f"{stem}.gating.{i}", dim, config.dep_hidden)


def hub_tensors(
    config: MoshiConfig, dep_q: int, seed: int, normal: Callable[[tuple[int, ...]], np.ndarray] | None = None
) -> dict[str, Tensor]:
    """All tensors of `hub_layout`, bfloat16 as on the hub. normal: where standard normal values come from, by shape."""
    normal = normal or np.random.RandomState(seed).standard_normal
    out: dict[str, Tensor] = {}
    for name, shape, mean, scale in hub_layout(config, dep_q):
        values = normal(shape).astype(np.float32) * scale
        out[name] = torch.from_numpy(mean + values if mean else values).to(torch.bfloat16)
    return out


def write_tokenizer(path: Path) -> None:
    """A sentencepiece model with the special tokens where Moshi has them: padding is 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        user_defined_symbols=["<system>"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def write_kyutai(folder: Path, config: MoshiConfig = KYUTAI, seed: int = 1) -> Path:
    """A checkpoint as kyutai/moshiko-pytorch-bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hub_tensors(config, 8, seed), folder / "model.safetensors")
    names = {"moshi_name": "model.safetensors", "tokenizer_name": TOKENIZER, "model_type": "moshi"}
    (folder / "config.json").write_text(json.dumps(raw_config(config) | names))
    write_tokenizer(folder / TOKENIZER)
    return folder


def write_persona(folder: Path, config: MoshiConfig = PERSONA, seed: int = 2) -> Path:
    """A checkpoint as nvidia/personaplex-7b-v1: 16 depformer steps, and a config that says next to nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hub_tensors(config, 16, seed), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "personaplex", "version": "7b-v1"}))
    write_tokenizer(folder / TOKENIZER)
    return folder


def write_codec(folder: Path) -> Path:
    """A Mimi in transformers' format with Moshi's rates and codes: 24 kHz, 12.5 Hz, 8 x 2048."""
    return save_codec(
        folder,
        sampling_rate=24000,
        upsampling_ratios=[8, 6, 5, 4],
        codebook_size=KYUTAI.card,
        num_quantizers=8,
        num_hidden_layers=1,
    )


def random_codes(batch: int, frames: int, text_card: int, seed: int = 0) -> Tensor:
    """Codes [B, 17, T] within their ranges."""
    rng = np.random.RandomState(seed)
    codes = rng.randint(0, KYUTAI.card, (batch, 17, frames))
    codes[:, 0] = rng.randint(0, text_card, (batch, frames))
    return torch.from_numpy(codes)
