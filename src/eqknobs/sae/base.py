"""What every sparse autoencoder shares: its configuration, its normaliser, its files and the register of variants.

Shapes: d = width of the latents, m = number of features (d_sae), N = frames. The normaliser (by default z-scoring with
the train frames' mean and deviation; see `input_scale`) is part of the artefact: everything public takes and returns
*raw* latents, and the file cannot be loaded without it. The blog's mush ("the hook passed raw latents
straight through") cannot be written against this interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_json, write_json

VARIANTS: dict[str, type["SAE"]] = {}
INPUT_SCALES = ("zscore", "raw", "unit_norm", "scalar")
NORM_FLOOR = 1e-12  # of a frame that is divided by its norm


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and how it is trained; each variant adds its own fields.

    input_scale, what the normaliser inside does: `zscore` (each dimension by the train frames' mean and deviation),
    `raw` (nothing), `scalar` (one number for all, the root of the train frames' mean squared norm) or `unit_norm`
    (each frame by its own L2 norm, which a reconstruction gets back).
    """

    d_in: int
    d_sae: int
    lr: float = 1e-3
    batch_size: int = 1024
    epochs: int = 30
    seed: int = 0
    input_scale: str = "zscore"
    variant: ClassVar[str]

    def require(self, good: bool, needs: str) -> None:
        """Raises EqknobsError naming what the configuration needs unless it is good."""
        if not good:
            raise EqknobsError(f"SAE config {self.as_dict()}: needs {needs}; see config/README.md")

    def as_dict(self) -> dict[str, Any]:
        """All fields and the variant's name, as config.json holds them; an input_scale `zscore` goes without saying."""
        values = {"variant": self.variant} | asdict(self)
        if self.input_scale == "zscore":  # files from before there was a choice stay what they are
            del values["input_scale"]
        return values


class Step(NamedTuple):
    """What one batch gives: the loss to descend, Σ squared error, active features in all, which features fired [m]."""

    loss: Tensor
    squared: Tensor
    active: float
    fired: Tensor


def register(cls: type["SAE"]) -> type["SAE"]:
    """Class decorator: makes a variant known by its configuration's name."""
    VARIANTS[cls.Config.variant] = cls
    return cls


def make_config(values: dict[str, Any]) -> SAEConfig:
    """The configuration of values["variant"] from plain values; None counts as left out.

    Raises EqknobsError: unknown variant, unknown keys, impossible values.
    """
    values = {key: value for key, value in values.items() if value is not None}
    variant = values.pop("variant", None)
    if variant not in VARIANTS:
        raise EqknobsError(f"SAE config: unknown variant {variant!r}, there are {', '.join(sorted(VARIANTS))}")
    kind = VARIANTS[variant].Config
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise EqknobsError(f"SAE config: unknown keys {sorted(unknown)} for {variant}; see config/README.md")
    config = kind(**values)
    config.require(config.input_scale in INPUT_SCALES, f"input_scale one of {', '.join(INPUT_SCALES)}")
    return config


def normaliser(config: SAEConfig, mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """What an SAE of the configuration subtracts and divides by, each [d]; mean and std [d] of the train frames."""
    mean, std = (torch.as_tensor(values, dtype=torch.float64) for values in (mean, std))
    if config.input_scale == "zscore":
        return mean, std
    size = (mean.square() + std.square()).sum().sqrt() if config.input_scale == "scalar" else torch.tensor(1.0)
    return torch.zeros_like(mean), size.expand(len(mean))


def new_sae(config: SAEConfig, mean: Any, std: Any) -> "SAE":
    """An untrained SAE of the configuration's variant; mean and std [d] of its normaliser (see `normaliser`)."""
    return VARIANTS[config.variant](config, mean, std)


class SAE(nn.Module, ABC):
    """A sparse autoencoder with its normaliser.

    Weights `W_enc` [m, d], `b_enc` [m], `W_dec` [m, d] (a row is a feature's direction), `b_dec` [d] act on
    scaled latents (z); buffers `mean` and `std` [d], with `input_scale`, turn raw latents into those. `encode`,
    `decode` and calling the module take NumPy arrays or tensors and answer in kind.
    """

    Config: ClassVar[type[SAEConfig]]
    mean: Tensor
    std: Tensor

    def __init__(self, config: SAEConfig, mean: Any, std: Any):
        super().__init__()
        self.config = config
        d, m = config.d_in, config.d_sae
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(d).clone())
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(d).clone())
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.std).all() and (self.std > 0).all()):
            raise EqknobsError("SAE normaliser: mean and std must be finite, std above 0; make the cache again")
        generator = torch.Generator().manual_seed(config.seed)
        directions = torch.randn(d, m, generator=generator).T.contiguous()
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(directions.clone())
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(torch.zeros(d))

    # --- raw latents in, raw latents out

    def encode(self, raw: Any) -> Any:
        """Raw latents [N, d] -> codes [N, m], non-negative. Raises EqknobsError for another width."""
        return self._answer(raw, lambda x: self._code(self._normalised(x)), self.config.d_in)

    def decode(self, codes: Any, like: Any = None) -> Any:
        """Codes [N, m] -> raw latents [N, d].

        like: raw latents [N, d] whose norms, frame by frame, the reconstruction gets back; needed with `input_scale`
        `unit_norm`, whose codes do not hold them, else ignored. Raises EqknobsError for another width, or without it.
        """
        if like is None and self._by_frame:
            raise EqknobsError(
                "SAE of input_scale unit_norm: codes do not hold a frame's norm; decode with `like`, or use scalar "
                "where codes are edited"
            )
        like = None if like is None else torch.as_tensor(like, dtype=torch.float32, device=self.mean.device)
        return self._answer(codes, lambda f: self._unscaled(self._reconstruct(f), like), self.config.d_sae)

    def forward(self, raw: Any) -> Any:
        """Raw latents -> their reconstruction, raw, [N, d]; with `unit_norm` at each frame's own norm."""
        return self.decode(self.encode(raw), raw)

    def save(self, folder: str | Path) -> None:
        """Write `sae.safetensors` and `config.json` into a folder, each atomically."""
        with atomic_path(Path(folder) / "sae.safetensors") as path:
            save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, path)
        write_json(Path(folder) / "config.json", self.config.as_dict())

    @staticmethod
    def load(folder: str | Path) -> "SAE":
        """Read a folder written by `save`; gradients off. Raises EqknobsError if anything, normaliser included,
        is missing or does not fit."""
        try:
            config = make_config(read_json(Path(folder) / "config.json"))
            tensors = load_file(Path(folder) / "sae.safetensors")
            if not all(torch.isfinite(t).all() for t in tensors.values()):
                raise EqknobsError(f"{folder}: the SAE's weights are not finite; train it again")
            sae = new_sae(config, tensors["mean"], tensors["std"])
            sae.load_state_dict(tensors)
        except KeyError as error:
            raise EqknobsError(f"{folder}: the SAE has no normaliser ({error}); train it again") from error
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
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
        return (raw / self._norms(raw) - self.mean) / self.std if self._by_frame else (raw - self.mean) / self.std

    def _unscaled(self, z: Tensor, like: Tensor | None) -> Tensor:
        """Scaled latents -> raw ones; like: raw latents with the norms that `unit_norm` took away."""
        raw = z * self.std + self.mean
        return raw * self._norms(like) if self._by_frame and like is not None else raw

    @property
    def _by_frame(self) -> bool:
        return self.config.input_scale == "unit_norm"

    @staticmethod
    def _norms(raw: Tensor) -> Tensor:
        return raw.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)

    def _reconstruct(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    # --- what a variant defines

    @abstractmethod
    def _code(self, z: Tensor) -> Tensor:
        """Scaled latents [N, d] -> the code [N, m] at inference."""

    @abstractmethod
    def _step(self, z: Tensor, dead: Tensor | None) -> Step:
        """Loss of one batch of scaled latents; `dead`: indices of features that have not fired for long."""

    def _start(self, z: Tensor) -> None:
        """Set what depends on data before the first step, from a sample of scaled train frames."""

    def _learning_rates(self) -> dict[str, float]:
        """Parameters whose learning rate is a multiple of the configured one: name -> multiple."""
        return {}

    def _before_update(self) -> None:
        """Change gradients before the optimiser's step."""

    def _after_update(self) -> None:
        """Restore constraints after the optimiser's step."""

    def _calibrate(self, blocks: Iterable[Tensor], frames: int) -> None:
        """Set what inference needs from blocks of scaled train frames, `frames` in all, at the end of an epoch."""
