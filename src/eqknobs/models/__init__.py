"""Models behind one protocol: read activations at sites, edit them there, continue the model from edited ones."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

import numpy as np

from eqknobs.errors import EqknobsError

if TYPE_CHECKING:
    from torch import Tensor

    # Activations [batch, frames, width] at a site, on the model's device -> what the model goes on with, as large.
    SiteEdit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A place where activations are read and, if the model decodes, written back."""

    name: str  # "encoder_transformer", "encoder_layer.3"
    path: str  # module path inside the network, resolved at load time
    width: int
    hop: int  # samples at the model's rate
    frame_rate: float  # Hz
    context: float  # seconds of left context that a frame depends on; inf: the whole clip


class Model(Protocol):
    """What the stages know of a model. Waveforms are float32 mono at `sample_rate`, activations float32
    [frames, width]; frame t of a codec covers samples [t * hop, (t + 1) * hop)."""

    name: str
    revision: str  # hub commit, or first 12 hex digits of the SHA-256 of a folder's weights
    device: str  # "cpu" or "cuda"
    sample_rate: int
    sites: dict[str, Site]
    n_codebooks: int  # 0: cannot quantise
    decodes: bool
    gradients: bool  # whether `decode_batch` has them

    def site(self, name: str) -> Site:
        """The site of that name. Raises EqknobsError, naming all sites, if there is none."""
        ...

    def frames(self, samples: int, site: str) -> int:
        """Number of valid frames of a clip of that many samples."""
        ...

    def encode(self, wav: np.ndarray, site: str) -> np.ndarray:
        """Activations [frames, width] of a waveform [samples]; padding is never returned."""
        ...

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """As `encode` at several sites, in one pass; each is bit for bit what `encode` gives."""
        ...

    def editing(self, site: str, edit: "SiteEdit") -> AbstractContextManager[None]:
        """While the block runs, the model goes on from `edit(activations)` at the site, whatever it does: a codec that
        reconstructs, a Whisper whose decoder reads what its encoder passes on, a Moshi that listens and answers.

        The edit gets the frames that the network runs at once (a chunk of a clip, a column of a dialogue, a Whisper's
        whole window with its padding), so it must take each frame for itself or know that. Blocks nest, edits of one
        site then act in turn; `encode` inside the block reads what the site passes on. Raises EqknobsError if there is
        no such site, and on running if an edit changes the shape.
        """
        ...

    def decode(self, acts: np.ndarray, site: str, samples: int, codebooks: int | None = None) -> np.ndarray:
        """Waveform [samples], the model continued from `acts` at the site; `codebooks` None skips the
        quantiser. Inside `editing`, `acts` are what the site passes on: edits there do not act, those of later sites
        do. Raises EqknobsError if the model does not decode."""
        ...

    def decode_batch(self, acts: "Tensor", site: str, codebooks: int | None = None) -> "Tensor":
        """Waveforms [batch, frames · hop] of activations [batch, frames, width], as `decode` but in one piece, so that
        memory grows with the clips. Around the quantiser (`codebooks` None) gradients reach `acts` where the model has
        `gradients`; through it none do. Raises EqknobsError for another shape, and if the model does not decode."""
        ...

    def reconstruct(self, wav: np.ndarray, codebooks: int | None = None) -> np.ndarray:
        """Waveform [samples] through the whole codec, edits included. Raises as `decode`."""
        ...

    def tokens(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        """Integer codes [codebooks, code frames] of `acts`; `codebooks` None means all."""
        ...

    def decoder_input(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        """What the decoder gets of `acts`, [code frames, width]: dequantised, `codebooks` None around the quantiser.
        Raises EqknobsError if the model does not decode."""
        ...

    def shuffle_weights(self, seed: int) -> None:
        """Move the entries of every weight tensor about inside it: the same architecture and the same sizes of weights,
        but nothing that was learnt."""
        ...

    def decode_tokens(self, tokens: np.ndarray, samples: int) -> np.ndarray:
        """Waveform [samples] of integer codes [codebooks, code frames], as a listener makes it who gets nothing else.
        Raises EqknobsError if the model does not decode."""
        ...


# The only list of kinds. Named, not imported, so that a stage depends on the code of the kind in use and on no other's.
KINDS = {
    "mimi": "eqknobs.models.mimi:Mimi",
    "encodec": "eqknobs.models.encodec:Encodec",
    "dac": "eqknobs.models.dac:Dac",
    "speechtokenizer": "eqknobs.models.speechtokenizer:SpeechTokenizer",
    "hubert": "eqknobs.models.hubert:Hubert",
    "whisper": "eqknobs.models.whisper:Whisper",
    "moshi": "eqknobs.models.moshi.adapter:Moshi",
}


class ModelCfg(TypedDict):
    """What `load_model` reads: an entry of `models`, its name and the device."""

    name: str
    kind: str  # of `KINDS`
    path: str  # a folder with `config.json` and safetensors weights, or a hub id
    revision: NotRequired[str | None]  # pins a hub model, or the weights of the folder
    device: NotRequired[str | None]  # auto | cpu | cuda
    # Of a moshi (`eqknobs.models.moshi.adapter`):
    codec: NotRequired[str]
    codec_revision: NotRequired[str | None]
    dtype: NotRequired[str]
    nf4: NotRequired[bool | dict[str, Any]]
    stream: NotRequired[str]


def load_model(cfg_model: ModelCfg) -> Model:
    """Load a model from a folder or from the hub. Weights become float32 (Moshi's: as asked), in evaluation mode.

    Raises EqknobsError: unknown kind, no such folder or hub model, folder without weights, pickled weights,
    weights that do not fit the architecture, no GPU.
    """
    kind = cfg_model["kind"]
    if kind not in KINDS:
        raise EqknobsError(f"models.{cfg_model['name']}.kind: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")  # imported when asked for: transformers takes seconds
    return getattr(import_module(module), name)(cfg_model)
