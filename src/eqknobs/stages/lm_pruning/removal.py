"""Heads really taken out, from full weights and from NF4: parameters, bytes, measured memory, time of a step.

The removed model is saved and measured in a process of its own (`footprint`), because what was freed before would hide
what is needed. What is left must say what it said with those heads zeroed: the weights that stay are the same to the
bit where they are not packed, or an NF4 block holds one head's values; sums are then added up in another order.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import DTYPES, Moshi
from eqknobs.models.moshi.checkpoint import load_net, save_net
from eqknobs.models.moshi.config import Nf4
from eqknobs.models.moshi.interventions import remove_heads, zeroed_heads
from eqknobs.models.moshi.likelihood import Said, nats
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.models.moshi.quantise import Linear, is_packed, weight_of
from eqknobs.stages.lm_pruning import footprint as measuring
from eqknobs.stages.lm_pruning.bench import PruningCfg
from eqknobs.stages.lm_pruning.plan import Head, by_layer

FRAMES = 40  # that are answered while time and memory are measured


def removal_rows(model: Moshi, cfg: PruningCfg, order: Sequence[Head], said: Sequence[Said]) -> list[dict[str, Any]]:
    """One record a format and share, the whole model (share 0) first. model: for its files; its network may be gone.

    `difference`: mean absolute difference of the nats of `said` with those heads zeroed and removed; `exact`: whether
    the weights that stay are the same to the bit. Raises EqknobsError if they are not where they must be.
    """
    removal, own = cfg["removal"], Nf4.of(cfg["model"].get("nf4"))
    assert removal is not None
    dtype = cfg["model"].get("dtype") or ("bfloat16" if model.device == "cuda" else "float32")
    formats: dict[str, Nf4 | None] = {dtype: None} if own is None else {}
    if removal["nf4"] or own is not None:
        formats["nf4"] = own or Nf4(double=False)
    rows = []
    for name, nf4 in formats.items():
        for share in (0.0, *removal["shares"]):
            gone = list(order[: round(share * len(order))])
            _free(model.device)
            net = load_net(model.files, DTYPES[dtype], nf4, model.device)
            checked = _remove(net, gone, said, nf4)
            row = {"format": name, "order": removal["order"], "share": share, "removed": len(gone), **checked}
            row["parameters"] = parameters(net)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "model"
                save_net(net, folder)
                del net
                _free(model.device)
                row["bytes"] = (folder / "model.safetensors").stat().st_size
                row |= footprint(folder, dtype, model.device)
            rows.append(row)
            print(f"{name}, {len(gone)} heads removed: {row['bytes']} bytes", flush=True)
    return rows


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _remove(net: MoshiNet, gone: Sequence[Head], said: Sequence[Said], nf4: Nf4 | None) -> dict[str, Any]:
    """Take heads out; how far that is from zeroing them."""
    heads = by_layer(gone)
    with inference(), zeroed_heads(net, heads):
        zeroed = nats(net, said)
    kept = _kept(net, heads)
    remove_heads(net, heads)
    with inference():
        removed = nats(net, said)
    exact = all(torch.equal(a, b) for a, b in zip(kept, _kept(net, {}), strict=True))
    if not exact and (nf4 is None or (not nf4.double and net.config.head_dim % nf4.block == 0)):
        raise EqknobsError("removing heads moved the weights of others; this is a bug, please report it")
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(zeroed[:2], removed[:2], strict=True)])
    return {"difference": float(apart.nanmean()), "exact": exact}


def _kept(net: MoshiNet, heads: dict[int, list[int]]) -> list[Tensor]:
    """Of every layer the weights of attention that belong to other heads than those."""
    found = []
    for number, layer in enumerate(net.layers):
        attention, dim = layer.self_attn, net.config.head_dim
        places = [i for i, head in enumerate(attention.heads) if head not in heads.get(number, [])]
        if places:
            found.append(weight_of(attention.in_proj).view(3, len(attention.heads), dim, -1)[:, places].clone())
            found.append(weight_of(attention.out_proj).view(-1, len(attention.heads), dim)[:, places].clone())
    return found


def parameters(net: MoshiNet) -> int:
    """How many values the weights stand for, packed or not."""
    linears: list[Linear] = [module for module in net.modules() if isinstance(module, torch.nn.Linear)]
    packed = {id(one.weight): one.weight.quant_state.shape.numel() for one in linears if is_packed(one)}
    return sum(packed.get(id(value), value.numel()) for value in net.parameters())


def footprint(folder: Path, dtype: str, device: str) -> dict[str, float]:
    """`peak_bytes` and `step_seconds` of a saved model that answers, in a process of its own.

    Raises EqknobsError if that process fails.
    """
    source = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", measuring.__name__, str(folder), dtype, device, str(FRAMES)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), "killed")
        raise EqknobsError(f"lm_pruning.removal: measuring a pruned model failed ({reason[:300]}); is memory short?")
    return json.loads(done.stdout)
