"""Sparse autoencoders over codec latents: `rms_l1` (audio-latent SAE paper, the blog) and `topk` (Gao et al. 2024).

Shapes: d = width of the latents, m = number of features (d_sae), N = frames. The normaliser (z-scoring with the train
frames' mean and deviation) is part of the artefact: everything public takes and returns *raw* latents, and the file
cannot be loaded without it. The blog's mush ("the hook passed raw latents straight through") cannot be written
against this interface.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from eqknobs.activations import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_json, write_csv, write_json
from eqknobs.models import gpu_lock, pick_device

EPS = 1e-8  # inside the RMS norm's root, as in the blog
AUX_COEFFICIENT = 1 / 32  # Gao et al. 2024, appendix A.2
ADAM_EPS = 6.25e-10  # Gao et al. 2024, appendix A.3
EVAL_FRAMES = 16384  # val frames looked at after each epoch
MATCH_FRAMES, MATCH_FEATURES, PERMUTATIONS = 2048, 512, 99  # cross-seed matching, bounded work
DENSITY_EDGES = np.arange(-5.0, 0.01, 0.25)  # log10 of the share of frames on which a feature fires


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and how it is trained. `k`, `aux_k`, `dead_epochs` are topk's; `l1`, `l1_on` are rms_l1's."""

    variant: str  # "rms_l1" | "topk"
    d_in: int
    d_sae: int
    k: int | None = None  # features kept on a frame
    l1: float | None = None  # λ of the L1 norm, in the paper's scale (squared error summed over d)
    l1_on: str | None = None  # "h": before the RMS norm (paper) | "f": after it (blog)
    lr: float = 1e-3
    batch_size: int = 1024
    epochs: int = 30
    aux_k: int = 0  # dead features that reconstruct the residual
    dead_epochs: float = 2  # a feature that has not fired for so many epochs is dead
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant == "topk":
            good, needs = isinstance(self.k, int) and 0 < self.k <= self.d_sae, "k between 1 and d_sae"
        elif self.variant == "rms_l1":
            good, needs = self.l1 is not None and self.l1_on in ("h", "f"), "l1 and l1_on: h or f"
        else:
            good, needs = False, "variant topk or rms_l1"
        if not good:
            raise EqknobsError(f"SAE config {asdict(self)}: needs {needs}; see config/README.md")


def rms_normalise(h: Tensor) -> Tensor:
    """h / rms(h) over the last axis: every code gets a mean square of 1 (audio-latent SAE paper, eq. 2)."""
    return h / torch.sqrt((h * h).mean(-1, keepdim=True) + EPS)


class SAE(nn.Module):
    """A sparse autoencoder with its normaliser.

    Weights `W_enc` [m, d], `b_enc` [m], `W_dec` [d, m], `b_dec` [d] act on z-scored latents; buffers `mean` and `std`
    [d] turn raw latents into those. `encode`, `decode` and calling the module take NumPy arrays or tensors and answer
    in kind.
    """

    def __init__(self, config: SAEConfig, mean: Any, std: Any):
        super().__init__()
        self.config = config
        d, m = config.d_in, config.d_sae
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(d).clone())
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(d).clone())
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.std).all() and (self.std > 0).all()):
            raise EqknobsError("SAE normaliser: mean and std must be finite, std above 0; make the cache again")
        generator = torch.Generator().manual_seed(config.seed)
        columns = torch.randn(d, m, generator=generator)
        columns /= columns.norm(dim=0)
        self.W_enc = nn.Parameter(columns.T.clone())
        # rms_l1 codes have norm √m whatever the frame, so their columns start short enough for x̂ to be x-sized.
        self.W_dec = nn.Parameter(columns * (1.0 if config.variant == "topk" else d / m))
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(torch.zeros(d))

    def encode(self, raw: Any) -> Any:
        """Raw latents [N, d] -> codes [N, m], non-negative. Raises EqknobsError for another width."""
        return self._answer(raw, lambda x: self._code(self._normalised(x))[1], self.config.d_in)

    def decode(self, codes: Any) -> Any:
        """Codes [N, m] -> raw latents [N, d]. Raises EqknobsError for another width."""
        return self._answer(codes, lambda f: self._reconstruct(f) * self.std + self.mean, self.config.d_sae)

    def forward(self, raw: Any) -> Any:
        """Raw latents -> their reconstruction, raw, [N, d]."""
        return self.decode(self.encode(raw))

    def save(self, folder: str | Path) -> None:
        """Write `sae.safetensors` and `config.json` into a folder, each atomically."""
        with atomic_path(Path(folder) / "sae.safetensors") as path:
            save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, path)
        write_json(Path(folder) / "config.json", asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Read a folder written by `save`; gradients off. Raises EqknobsError if anything, normaliser included,
        is missing or does not fit."""
        try:
            config = SAEConfig(**read_json(Path(folder) / "config.json"))
            tensors = load_file(Path(folder) / "sae.safetensors")
            sae = cls(config, tensors["mean"], tensors["std"])
            sae.load_state_dict(tensors)
        except KeyError as error:
            raise EqknobsError(f"{folder}: the SAE has no normaliser ({error}); train it again") from error
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise EqknobsError(f"{folder} is not an SAE: {str(error)[:200]}; train it again") from error
        return sae.requires_grad_(False).eval()

    def _answer(self, values: Any, function: Any, width: int) -> Any:
        x = torch.as_tensor(values, dtype=torch.float32, device=self.mean.device)
        if x.shape[-1] != width:
            raise EqknobsError(
                f"SAE ({self.config.variant}, {self.config.d_in} -> {self.config.d_sae}): got width {x.shape[-1]}, "
                f"needs {width}; use the SAE of this target"
            )
        if isinstance(values, Tensor):
            return function(x)
        with torch.no_grad():
            return function(x).cpu().numpy()

    def _normalised(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def _code(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z-scored latents -> (h, f): activations after the ReLU, and the code that the decoder reads."""
        if self.config.variant == "rms_l1":  # paper: h = ReLU(W x + b), f = RMSNorm(h)
            h = torch.relu(nn.functional.linear(z, self.W_enc, self.b_enc))
            return h, rms_normalise(h)
        # W (z − b_dec) + b with b_dec moved into the bias: its gradient is then a matrix–vector product.
        h = torch.relu(nn.functional.linear(z, self.W_enc, self.b_enc - self.W_enc @ self.b_dec))
        kept = h.topk(self.config.k, dim=-1, sorted=False)
        return h, torch.zeros_like(h).scatter(-1, kept.indices, kept.values)

    def _reconstruct(self, f: Tensor) -> Tensor:
        return nn.functional.linear(f, self.W_dec, self.b_dec)


def geometric_median(points: Tensor, steps: int = 50) -> Tensor:
    """Weiszfeld's iteration for argmin_y Σ ‖x − y‖, [N, d] -> [d] (Gao et al.: the start of b_dec)."""
    median = points.mean(0)
    for _ in range(steps):
        weight = 1 / (points - median).norm(dim=1).clamp_min(1e-6)
        median = (weight[:, None] * points).sum(0) / weight.sum()
    return median


def train_sae(cache_h5: str | Path, out_dir: str | Path, cfg: dict[str, Any], seed: int) -> None:
    """Train one SAE on the train frames of a cache; write `sae.safetensors`, `config.json`, `log.csv` to `out_dir`.

    cfg: the fields of `SAEConfig` but d_in and seed, and `device` (auto | cpu | cuda). Each epoch is one permutation of
    all train frames, read from the memory map batch by batch. The loss is a mean over frames of, divided by d,

    - rms_l1: ‖z − ẑ‖² + λ ‖h‖₁ (or ‖f‖₁), the paper's form. f ignores the scale of h, so an L1 on h can be dodged by
      shrinking h: read the L0 in the log;
    - topk: ‖z − ẑ‖² + ‖e − ê‖² / 32, ê the residual e rebuilt from `aux_k` dead features.

    The learning rate falls linearly to 0 over the last fifth of the steps. log.csv has one row an epoch: epoch, step,
    loss, fvu, l0 (train, averaged over the epoch), dead_share, val_fvu, val_l0. After each epoch the state is kept in
    `<out_dir>.checkpoint-<hash>.pt`: a killed run goes on from there and, with equal threads, ends with equal bytes.
    Raises EqknobsError: impossible config, no train frames, loss not finite.
    """
    out_dir = Path(out_dir)
    cfg = {key: value for key, value in cfg.items() if value is not None}
    device = pick_device(cfg.pop("device", "cpu"))
    with ActivationCache(cache_h5) as cache, gpu_lock(device):
        unknown = set(cfg) - {field.name for field in fields(SAEConfig)}
        if unknown:
            raise EqknobsError(f"SAE config: unknown keys {sorted(unknown)}; see config/README.md")
        config = SAEConfig(**(cfg | {"d_in": cache.acts.shape[1], "seed": seed}))
        trainer = _Trainer(cache, config, device)
        identity = [asdict(config), cache.attrs["manifest_sha256"], cache.attrs["model"], cache.attrs["site"]]
        digest = hashlib.sha256(json.dumps([str(item) for item in identity]).encode())
        digest.update(cache.mean.tobytes() + cache.std.tobytes())
        checkpoint = out_dir.with_name(f"{out_dir.name}.checkpoint-{digest.hexdigest()[:12]}.pt")
        for stale in out_dir.parent.glob(f"{out_dir.name}.checkpoint-*.pt"):
            if stale != checkpoint:
                stale.unlink()
        if checkpoint.exists():
            trainer.load_state_dict(torch.load(checkpoint, weights_only=True, map_location=device))
        label = f"SAE {config.variant} seed {seed}"
        epochs = range(len(trainer.log), config.epochs)
        progress = tqdm(epochs, desc=label, unit="epoch", initial=len(trainer.log), total=config.epochs)
        for epoch in progress:
            trainer.train_epoch(epoch)
            progress.set_postfix(fvu=f"{trainer.log[-1]['val_fvu']:.3f}", l0=f"{trainer.log[-1]['val_l0']:.0f}")
            _save_checkpoint(checkpoint, trainer.state_dict())
        trainer.sae.save(out_dir)
        write_csv(out_dir / "log.csv", pd.DataFrame(trainer.log))
        checkpoint.unlink(missing_ok=True)


def _save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


class _Trainer:
    """Everything a training run changes. Randomness is a function of (seed, epoch), so no generator is kept."""

    def __init__(self, cache: ActivationCache, config: SAEConfig, device: str):
        self.cache, self.config, self.device = cache, config, device
        self.rows, val = cache.rows("train"), cache.rows("val")
        if len(self.rows) == 0:
            raise EqknobsError("no train frames in the activation cache; raise data.splits.train")
        self.val_rows = val[:: max(1, -(-len(val) // EVAL_FRAMES))]
        self.sae = SAE(config, cache.mean, cache.std).to(device)
        if config.variant == "topk":
            sample = self.rows[:: max(1, -(-len(self.rows) // EVAL_FRAMES))]
            self.sae.b_dec.data = geometric_median(self.sae._normalised(self._raw(sample)))
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=config.lr, eps=ADAM_EPS, fused=True)
        self.idle = torch.zeros(config.d_sae, dtype=torch.int64, device=device)  # frames since a feature fired
        self.step = 0
        self.log: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "idle": self.idle,
            "step": self.step,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.idle, self.step, self.log = state["idle"], state["step"], state["log"]

    def _raw(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(self.cache.acts[rows])).to(self.device)

    def dead(self) -> Tensor:
        return self.idle >= self.config.dead_epochs * len(self.rows)

    def train_epoch(self, epoch: int) -> None:
        config, sae = self.config, self.sae
        order = np.random.default_rng([config.seed, epoch]).permutation(self.rows)
        batches = range(0, len(order), config.batch_size)
        total_steps = len(batches) * config.epochs
        sums = torch.zeros(4, dtype=torch.float64)  # loss, squared error, squared total, active features
        for start in batches:
            rows = np.sort(order[start : start + config.batch_size])  # in file order: reads run forward
            z = sae._normalised(self._raw(rows))
            h, f = sae._code(z)
            error = z - sae._reconstruct(f)
            squared = error.square().sum()
            loss = squared / z.numel()
            if config.variant == "topk":
                dead = self.dead().nonzero()[:, 0]
                if config.aux_k and len(dead):
                    loss = loss + AUX_COEFFICIENT * self._auxiliary(z, error.detach(), dead)
            else:
                loss = loss + config.l1 * (h if config.l1_on == "h" else f).sum() / z.numel()
            if not torch.isfinite(loss):
                raise EqknobsError(f"SAE {config.variant}: the loss became {loss.item()} in epoch {epoch}; lower lr")
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._update(total_steps)
            active = f.detach() > 0
            self.idle += len(z)
            self.idle[active.any(0)] = 0
            with torch.no_grad():
                terms = (loss * len(z), squared, z.square().sum(), active.sum())
                sums += torch.stack([term.double().cpu() for term in terms])
        loss, squared, total, active = (sums / len(order)).tolist()
        val_fvu, val_l0 = self._evaluate()
        self.log.append(
            {
                "epoch": epoch + 1,
                "step": self.step,
                "loss": loss,
                "fvu": squared / total,
                "l0": active,
                "dead_share": self.dead().double().mean().item(),
                "val_fvu": val_fvu,
                "val_l0": val_l0,
            }
        )

    def _auxiliary(self, z: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """AuxK: mean squared error of the residual rebuilt from the strongest `aux_k` dead features."""
        sae = self.sae
        weights = sae.W_enc[dead]
        h = torch.relu(nn.functional.linear(z, weights, sae.b_enc[dead] - weights @ sae.b_dec))
        kept = h.topk(min(self.config.aux_k, len(dead)), dim=-1, sorted=False)
        code = torch.zeros_like(h).scatter(-1, kept.indices, kept.values)
        return (error - nn.functional.linear(code, sae.W_dec[:, dead])).square().mean()

    def _update(self, total_steps: int) -> None:
        """One Adam step; topk keeps its decoder's columns at unit norm and drops the gradient along them."""
        decoder, topk = self.sae.W_dec, self.config.variant == "topk"
        if topk:
            with torch.no_grad():
                decoder.grad -= decoder * (decoder * decoder.grad).sum(0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * min(1.0, 5 * (1 - self.step / total_steps))
        self.optimiser.step()
        self.step += 1
        if topk:
            with torch.no_grad():
                decoder /= decoder.norm(dim=0)

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """(FVU, L0) on val; NaN without val frames."""
        squared = total = active = 0.0
        for start in range(0, len(self.val_rows), 4096):
            z = self.sae._normalised(self._raw(self.val_rows[start : start + 4096]))
            f = self.sae._code(z)[1]
            squared += (z - self.sae._reconstruct(f)).square().sum().item()
            total += z.square().sum().item()
            active += (f > 0).sum().item()
        count = len(self.val_rows)
        return (squared / total, active / count) if count else (float("nan"), float("nan"))


def score_saes(
    cache_h5: str | Path,
    sae_dirs: dict[str, dict[int, Path]],
    out_csv: str | Path,
    out_json: str | Path,
    cfg: dict[str, Any],
) -> None:
    """Score SAEs on val and test. sae_dirs: SAE name -> seed -> folder; cfg: `seed` (of the permutations).

    out_csv: one row an (utterance, SAE, seed): id, speaker, split, sae, seed, variant, d_in, d_sae, frames, l0_sum,
    sq_error, sq_total, in z-scored units as in training (each dimension weighs the same), sq_total around the train
    mean: FVU = Σ sq_error / Σ sq_total, 1 for the mean predictor.
    out_json: `{"saes": {name: {seed: {frames, dead_share, density}}}, "cross_seed": {name: ...}}`, all on val frames;
    a feature is dead there if it never fires; density is a histogram of log10(share of frames on which a feature
    fires) with dead features left out; `cross_seed` as in `match_features`, null with a single seed.
    """
    rows, details, matches = [], {}, {}
    with ActivationCache(cache_h5) as cache:
        utterances = cache.utterances[cache.utterances["split"].isin(["val", "test"])]
        for name in sorted(sae_dirs):
            loaded = {seed: SAE.load(folder) for seed, folder in sorted(sae_dirs[name].items())}
            details[name] = {}
            for seed, sae in loaded.items():
                scores, fired, frames = _score(cache, utterances, sae, f"score {name} seed {seed}")
                kept = ("variant", "d_in", "d_sae")
                same = {"sae": name, "seed": seed} | {key: getattr(sae.config, key) for key in kept}
                rows += [score | same for score in scores]
                details[name][str(seed)] = _firing(fired, frames)
            matches[name] = match_features(cache, loaded, cfg["seed"])
    columns = "id speaker split sae seed variant d_in d_sae frames l0_sum sq_error sq_total".split()
    write_csv(out_csv, pd.DataFrame(rows, columns=columns))
    write_json(out_json, {"saes": details, "cross_seed": matches})


def _blocks(cache: ActivationCache, start: int, frames: int, size: int = 4096) -> Iterator[np.ndarray]:
    for first in range(start, start + frames, size):
        yield np.array(cache.acts[first : min(first + size, start + frames)])


@torch.no_grad()
def _score(
    cache: ActivationCache, utterances: pd.DataFrame, sae: SAE, label: str
) -> tuple[list[dict[str, Any]], np.ndarray, int]:
    """Rows of one SAE, how often each feature fired on val [m], and the number of val frames."""
    rows, fired, val_frames = [], np.zeros(sae.config.d_sae, dtype=np.int64), 0
    for utterance in tqdm(utterances.itertuples(), desc=label, total=len(utterances), unit="utt"):
        squared = total = active = 0.0
        for block in _blocks(cache, utterance.start, utterance.frames):
            z = sae._normalised(torch.from_numpy(block))
            f = sae._code(z)[1]
            squared += (z - sae._reconstruct(f)).double().square().sum().item()
            total += z.double().square().sum().item()
            on = (f > 0).sum(0).numpy()
            active += int(on.sum())
            if utterance.split == "val":
                fired += on
                val_frames += len(z)
        keys = {key: getattr(utterance, key) for key in ("id", "speaker", "split", "frames")}
        rows.append(keys | {"l0_sum": active, "sq_error": squared, "sq_total": total})
    return rows, fired, val_frames


def _firing(fired: np.ndarray, frames: int) -> dict[str, Any]:
    if frames == 0:
        raise EqknobsError("no val frames in the activation cache; raise data.splits.val")
    share = np.log10(fired[fired > 0] / frames)
    counts, _ = np.histogram(np.maximum(share, DENSITY_EDGES[0]), bins=DENSITY_EDGES)
    return {
        "frames": frames,
        "dead_share": float((fired == 0).mean()),
        "density": {"log10_edges": DENSITY_EDGES.tolist(), "counts": counts.tolist()},
    }


def match_features(cache: ActivationCache, saes: dict[int, SAE], seed: int) -> dict[str, Any] | None:
    """How well the features of one training seed are found again in another (first two seeds), with a null.

    For each live feature of the first SAE (at most 512, drawn evenly) the best match among the live features of the
    second: cosine of the decoder columns, and IoU of the firing patterns on val frames (AudioSAE). Averages stand
    beside the mean over 99 permutations (`_null`) and p = (1 + permutations at least as good) / 100. The null of the
    cosine shuffles each column's entries; the null of the IoU shifts the second SAE's frames in a circle, which keeps
    densities and co-firing and only breaks the frame-by-frame agreement. Even dictionaries that were never trained
    pass the second, because they look at the same frames: `_untrained` is the same number for them, the baseline.
    Returns None with fewer than two seeds or no live feature.
    """
    if len(saes) < 2:
        return None
    first, second = sorted(saes)[:2]
    rng = np.random.default_rng([seed, 4])
    rows = cache.rows("val")
    raw = np.array(cache.acts[rows[:: max(1, -(-len(rows) // MATCH_FRAMES))]])
    a, on_a = _live(saes[first], raw, MATCH_FEATURES)
    b, on_b = _live(saes[second], raw)
    if not a.size or not b.size or len(raw) < 2:
        return None
    untrained = [SAE(saes[s].config, cache.mean, cache.std) for s in (first, second)]
    (a0, on_a0), (b0, on_b0) = _live(untrained[0], raw, MATCH_FEATURES), _live(untrained[1], raw)
    shifts = rng.integers(1, len(raw), PERMUTATIONS)
    nulls = {
        "cosine": [_best_cosine(a, rng.permuted(b, axis=0)) for _ in shifts],
        "iou": [_best_iou(on_a, np.roll(on_b, shift, axis=0)) for shift in shifts],
    }
    found = {"cosine": _best_cosine(a, b), "iou": _best_iou(on_a, on_b)}
    baseline = {"cosine": _best_cosine(a0, b0), "iou": _best_iou(on_a0, on_b0)}
    result = {"seeds": [first, second], "features": [a.shape[1], b.shape[1]], "frames": len(raw)}
    for name, null in nulls.items():
        result[name] = found[name]
        result[f"{name}_untrained"] = baseline[name]
        result[f"{name}_null"] = float(np.mean(null))
        result[f"{name}_p"] = float((1 + np.sum(np.array(null) >= found[name])) / (1 + PERMUTATIONS))
    return result


def _live(sae: SAE, raw: np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unit decoder columns [d, n] and firing [N, n] (0 or 1) of features that fire on raw latents, at most `limit`."""
    fired = sae.encode(raw) > 0
    live = np.flatnonzero(fired.any(0))
    if limit:
        live = live[:: max(1, -(-len(live) // limit))]
    columns = sae.W_dec.detach().numpy()[:, live]
    return columns / np.linalg.norm(columns, axis=0), fired[:, live].astype(np.float32)


def _best_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.T @ b).max(1).mean())


def _best_iou(a: np.ndarray, b: np.ndarray) -> float:
    both = a.T @ b
    return float((both / (a.sum(0)[:, None] + b.sum(0) - both)).max(1).mean())
