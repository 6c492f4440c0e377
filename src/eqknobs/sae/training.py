"""Training: whole-epoch permutations of a memory-mapped cache, several SAEs on one pass, resumable to the byte on
one machine."""

import ctypes
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_csv, write_csv
from eqknobs.sae.base import SAEConfig, make_config, new_sae, normaliser

ADAM_EPS = 6.25e-10  # Gao et al. 2024, appendix A.3
SAMPLE_FRAMES = 16384  # val frames looked at after each epoch; train frames for starts and thresholds
BLOCK = 4096


class SAECfg(TypedDict):
    """What trains an SAE: an entry of `saes`. The rest are the fields of its variant's configuration (`sae.base`)."""

    variant: str
    d_sae: int
    lr: float
    batch_size: int  # frames
    epochs: int
    seed: NotRequired[int]
    input_scale: NotRequired[str]
    l1: NotRequired[float]
    l1_on: NotRequired[str]
    k: NotRequired[int]
    aux_k: NotRequired[int]
    dead_epochs: NotRequired[float]
    l0: NotRequired[float]
    l0_coefficient: NotRequired[float]
    bandwidth: NotRequired[float]
    threshold_lr: NotRequired[float]


class GridCfg(SAECfg):
    """An entry of `saes` with a grid."""

    grid: dict[str, list[float]]  # key -> values


def keep_freed_memory() -> None:
    """Let this process keep what it frees (glibc only), instead of mapping a step's matrices anew in the next one.

    That mapping is a tenth of a step; at its peak, memory is up to half more.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing has a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


class Trainer:
    """One SAE in training: everything that a run changes.

    Randomness is a function of (seed, epoch), so no generator is kept. `frames`: train frames of an epoch, `steps`: of
    the whole run. Attributes `sae`, `optimiser`, `idle` (frames since each feature fired, int64 [m]), `done` (steps),
    `log` (one record an epoch).
    """

    def __init__(self, config: SAEConfig, mean: Any, std: Any, frames: int, steps: int, device: str = "cpu"):
        keep_freed_memory()
        self.config, self.device, self.frames, self.steps = config, device, frames, steps
        self.sae = new_sae(config, *normaliser(config, mean, std)).to(device)
        multiples = self.sae._learning_rates()
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.sae.named_parameters():
            groups.setdefault(multiples.get(name, 1.0), []).append(parameter)
        parameters = [{"params": group, "multiple": multiple} for multiple, group in groups.items()]
        self.optimiser = torch.optim.Adam(parameters, lr=config.lr, eps=ADAM_EPS, fused=True)
        self.idle = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.done = 0
        self.log: list[dict[str, float]] = []
        self._sums = np.zeros(4)  # of the epoch under way: loss, squared error, squared total, active features

    def start(self, raw: np.ndarray) -> None:
        """Set what depends on data from a sample of raw train frames."""
        self.sae._start(self.sae._normalised(self._tensor(raw)))

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, between epochs."""
        sae, optimiser = self.sae.state_dict(), self.optimiser.state_dict()
        return {"sae": sae, "optimiser": optimiser, "idle": self.idle, "done": self.done, "log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.idle, self.done, self.log = state["idle"], state["done"], state["log"]

    def _total(self, z: Tensor) -> float:
        """Σ squared distance of scaled latents to their mean, which is 0 where they are z-scored."""
        return float((z if self.config.input_scale == "zscore" else z - z.mean(0)).square().sum())

    def _tensor(self, raw: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(raw)).to(self.device)

    def dead(self) -> Tensor:
        """Mask [m] of features that have not fired for `dead_epochs` epochs (variants without: for two)."""
        return self.idle >= getattr(self.config, "dead_epochs", 2) * self.frames

    def step(self, raw: Tensor) -> float:
        """One optimiser step on a batch of raw latents [B, d]; returns the loss. Raises EqknobsError if not finite."""
        sae = self.sae
        z = sae._normalised(raw)
        found = sae._step(z, self.dead().nonzero()[:, 0])
        loss = found.loss.item()
        if not np.isfinite(loss):
            raise EqknobsError(f"SAE {self.config.variant}: the loss became {loss} at step {self.done}; lower lr")
        self.optimiser.zero_grad(set_to_none=True)
        found.loss.backward()
        sae._before_update()
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * group["multiple"] * min(1.0, 5 * (1 - self.done / self.steps))
        self.optimiser.step()
        sae._after_update()
        self.done += 1
        self.idle += len(z)
        self.idle[found.fired] = 0
        self._sums += [loss * len(z), float(found.squared), self._total(z), found.active]
        return loss

    def end_epoch(self, train: np.ndarray, val: np.ndarray) -> None:
        """Calibrate on raw train frames, measure FVU and L0 on raw val frames, write the epoch's record."""
        blocks = (self.sae._normalised(self._tensor(train[i : i + BLOCK])) for i in range(0, len(train), BLOCK))
        self.sae._calibrate(blocks, len(train))
        val_fvu, val_l0 = self._evaluate(val)
        loss, squared, total, active = self._sums.tolist()
        self._sums = np.zeros(4)
        self.log.append(
            {
                "epoch": len(self.log) + 1,
                "step": self.done,
                "loss": loss / self.frames,
                "fvu": squared / total if total else float("nan"),
                "l0": active / self.frames,
                "dead_share": self.dead().double().mean().item(),
                "val_fvu": val_fvu,
                "val_l0": val_l0,
            }
        )

    @torch.no_grad()
    def _evaluate(self, raw: np.ndarray) -> tuple[float, float]:
        """(FVU, L0); NaN without frames."""
        squared = total = active = 0.0
        for start in range(0, len(raw), BLOCK):
            z = self.sae._normalised(self._tensor(raw[start : start + BLOCK]))
            f = self.sae._code(z)
            squared += (z - self.sae._reconstruct(f)).double().square().sum().item()
            total += self._total(z.double())
            active += (f > 0).sum().item()
        return (squared / total, active / len(raw)) if len(raw) else (float("nan"), float("nan"))


def epoch_order(rows: np.ndarray, seed: int, epoch: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches of one permutation of `rows`, each in file order, so that reads of the memory map run forward."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    for start in range(0, len(order), batch_size):
        yield np.sort(order[start : start + batch_size])


def train_sae(cache_h5: str | Path, out_dir: str | Path, cfg: SAECfg, seed: int, device: str = "cpu") -> None:
    """Train one SAE on the train frames of a cache; write `sae.safetensors`, `config.json`, `log.csv` to `out_dir`.

    device: auto | cpu | cuda. Each epoch is one permutation of all train frames, read from the memory map by batches.
    The learning rate falls linearly to 0 over the last fifth of the steps. log.csv has one row an epoch: epoch, step,
    loss, fvu, l0 (train, averaged over the epoch), dead_share, val_fvu, val_l0. After each epoch the state is kept in
    `<out_dir>.checkpoint-<hash>.pt`: a killed run goes on from there and, on one machine with equal threads, ends with
    equal bytes.
    Raises EqknobsError: impossible config, no train frames, loss not finite.
    """
    train_together(cache_h5, {Path(out_dir): {**cfg, "seed": seed}}, Path(out_dir), device)


def train_grid(cache_h5: str | Path, out_dir: str | Path, cfg: GridCfg, seed: int, device: str = "cpu") -> None:
    """Train every combination of the lists in cfg["grid"] on one pass over the data.

    Each batch is read once for all. Writes `<out_dir>/<key><value>.<key><value>…/` as `train_sae` does, and
    `<out_dir>/front.csv`: the grid's keys, val_fvu, val_l0, dead_share of the last epoch.
    """
    out_dir, grid = Path(out_dir), cfg["grid"]
    rest = {key: value for key, value in cfg.items() if key != "grid"} | {"seed": seed}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    folders = {out_dir / ".".join(f"{key}{value}" for key, value in p.items()): rest | p for p in points}
    train_together(cache_h5, folders, out_dir / "grid", device)
    rows = []
    for point, folder in zip(points, folders, strict=True):
        last = read_csv(folder / "log.csv").iloc[-1]
        rows.append(point | {key: last[key] for key in ("val_fvu", "val_l0", "dead_share")})
    write_csv(out_dir / "front.csv", pd.DataFrame(rows))


def train_together(
    cache_h5: str | Path, outputs: Mapping[Path, Mapping[str, Any]], checkpoint_stem: Path, device: str = "cpu"
) -> None:
    """Train several SAEs on the same batches; outputs: folder -> configuration (without d_in).

    All must share `batch_size` and `epochs`; the first one's seed orders the data. See `train_sae`.
    """
    device = pick_device(device)
    with ActivationCache(cache_h5) as cache, gpu_lock(device):
        configs = [make_config({**cfg, "d_in": cache.acts.shape[1]}) for cfg in outputs.values()]
        first = configs[0]
        if len({(config.batch_size, config.epochs) for config in configs}) > 1:
            raise EqknobsError(
                "SAEs trained on one pass need one batch_size and one epochs; give them their own entries"
            )
        rows, val = cache.rows("train"), cache.rows("val")
        if len(rows) == 0:
            raise EqknobsError("no train frames in the activation cache; raise data.splits.train")
        sample, val_sample = (np.array(cache.acts[_thinned(part)]) for part in (rows, val))
        steps = -(-len(rows) // first.batch_size) * first.epochs
        trainers = [Trainer(config, cache.mean, cache.std, len(rows), steps, device) for config in configs]
        checkpoint = _checkpoint_path(checkpoint_stem, configs, cache)
        _begin(trainers, checkpoint, sample, device)
        label = f"SAE {first.variant} seed {first.seed}" + (f" x{len(configs)}" if len(configs) > 1 else "")
        start = len(trainers[0].log)
        progress = tqdm(range(start, first.epochs), desc=label, unit="epoch", initial=start, total=first.epochs)
        for epoch in progress:
            for batch in epoch_order(rows, first.seed, epoch, first.batch_size):
                raw = torch.from_numpy(cache.acts[batch]).to(device)
                for trainer in trainers:
                    trainer.step(raw)
            for trainer in trainers:
                trainer.end_epoch(sample, val_sample)
            last = trainers[0].log[-1]
            progress.set_postfix(fvu=f"{last['val_fvu']:.3f}", l0=f"{last['val_l0']:.0f}")
            _save_checkpoint(checkpoint, [trainer.state_dict() for trainer in trainers])
        for trainer, folder in zip(trainers, outputs, strict=True):
            trainer.sae.save(folder)
            write_csv(folder / "log.csv", pd.DataFrame(trainer.log))
        checkpoint.unlink(missing_ok=True)


def _begin(trainers: list[Trainer], checkpoint: Path, sample: np.ndarray, device: str) -> None:
    """Resume from the checkpoint where there is one; else set what depends on data from a sample of train frames."""
    if checkpoint.exists():
        states = torch.load(checkpoint, weights_only=True, map_location=device)
        for trainer, state in zip(trainers, states, strict=True):
            trainer.load_state_dict(state)
    else:
        for trainer in trainers:
            trainer.start(sample)


def _thinned(rows: np.ndarray) -> np.ndarray:
    """At most SAMPLE_FRAMES rows, evenly."""
    return rows[:: max(1, -(-len(rows) // SAMPLE_FRAMES))]


def _checkpoint_path(stem: Path, configs: list[SAEConfig], cache: ActivationCache) -> Path:
    """Where this run keeps its state; checkpoints of other configurations or data beside it are removed."""
    identity = [
        [c.as_dict() for c in configs],
        cache.attrs["manifest_sha256"],
        cache.attrs["model"],
        cache.attrs["site"],
    ]
    digest = hashlib.sha256(json.dumps([str(item) for item in identity]).encode())
    digest.update(cache.mean.tobytes() + cache.std.tobytes())
    checkpoint = stem.with_name(f"{stem.name}.checkpoint-{digest.hexdigest()[:12]}.pt")
    for stale in stem.parent.glob(f"{stem.name}.checkpoint-*.pt"):
        if stale != checkpoint:
            stale.unlink()
    return checkpoint


def _save_checkpoint(path: Path, state: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
