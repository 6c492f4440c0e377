"""What the transformers adapters share: safe loading, sites, hooks, inference mode."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from eqknobs.device import pick_device
from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg, Site
from eqknobs.packing.files import is_packed_folder, read_packed
from eqknobs.packing.notes import NAME as PACKED

if TYPE_CHECKING:
    from eqknobs.models import SiteEdit

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Made at construction, used in training only, and absent from some published encoders.
UNUSED_KEYS = {"masked_spec_embed"}


def folder_weights(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, or the packed one (docs/packing.md).

    Raises EqknobsError if it has none, both kinds, or no config.
    """
    if not (folder / "config.json").is_file():
        raise EqknobsError(f"models.{name}.path: {folder} has no config.json; give a whole model folder")
    weights = sorted(folder.glob("model*.safetensors"))
    if is_packed_folder(folder):
        if weights:
            raise EqknobsError(
                f"models.{name}.path: {folder} holds {PACKED} beside {weights[0].name}; move one of them elsewhere"
            )
        return [folder / PACKED]
    if weights:
        return weights
    if pickled := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]:
        raise EqknobsError(
            f"models.{name}.path: {folder} holds only pickled weights ({pickled[0]}), which can run code "
            "when read; convert them to model.safetensors"
        )
    raise EqknobsError(f"models.{name}.path: {folder} has no weights; put model.safetensors there")


def weights_hash(weights: list[Path]) -> str:
    """First 12 hex digits of the SHA-256 of the weight files, one after another."""
    digest = hashlib.sha256()
    for path in weights:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def load_pretrained(cls: Any, cfg: ModelCfg) -> tuple[Any, str]:
    """Load a network of class `cls` and its revision; see `load_model` for cfg and errors."""
    name, path, pinned = cfg["name"], str(cfg["path"]), cfg.get("revision")
    folder = Path(path)
    if folder.is_dir():
        revision = weights_hash(folder_weights(folder, name))
        if pinned is not None and pinned != revision:
            raise EqknobsError(
                f"models.{name}.revision: {folder} has weights {revision}, not {pinned}; mend the folder or the config"
            )
        where = f"folder {folder}"
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise EqknobsError(f"models.{name}.path: no folder {path}; give a model folder or a hub id such as owner/name")
    else:
        where = f"{path!r} (no such folder, so taken as a hub id)"
        with one_line(f"models.{name}: cannot load {where}; check path, revision and network"):
            # The snapshot's folder is named after the commit; what follows reads that very commit.
            revision = Path(hf_hub_download(path, "config.json", revision=pinned)).parent.name
    with one_line(f"models.{name}: cannot read config.json of {where}"):
        config, _ = cls.config_class.get_config_dict(path, revision=revision)
    if config.get("model_type") != cfg["kind"]:
        raise EqknobsError(
            f"models.{name}.kind: {where} is of type {config.get('model_type')!r}, not {cfg['kind']!r}; "
            "mend kind or path"
        )
    given: dict[str, Any] = {"pretrained_model_name_or_path": path, "revision": revision, "use_safetensors": True}
    if folder.is_dir() and is_packed_folder(folder):
        given = {"pretrained_model_name_or_path": None, "state_dict": read_packed(folder)}
        with one_line(f"models.{name}: cannot read config.json of {where}"):
            given["config"] = cls.config_class.from_pretrained(path)
    with one_line(f"models.{name}: cannot load the safetensors weights of {where}"):
        net, info = cls.from_pretrained(**given, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(key for key in info["missing_keys"] if key.split(".")[-1] not in UNUSED_KEYS):
        # transformers would go on with random values in their place
        raise EqknobsError(
            f"models.{name}: the weights of {where} lack {len(missing)} tensors, the first {missing[0]}; "
            "the file is not a whole model"
        )
    return net, revision


@contextmanager
def one_line(message: str) -> Iterator[None]:
    """Turn whatever a third-party loader raises into one EqknobsError."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError and more
        reason = next(iter(str(error).strip().splitlines()), "")
        raise EqknobsError(f"{message} ({type(error).__name__}: {reason[:300]})") from error


@contextmanager
def gpu_memory() -> Iterator[None]:
    """A full GPU becomes one clear line."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise EqknobsError(
            "the GPU is out of memory: close other programs, lower data.max_seconds, pack a Moshi (nf4) or set "
            "device to cpu"
        ) from error


@contextmanager
def inference() -> Iterator[None]:
    """No gradients; a full GPU becomes one clear line."""
    with gpu_memory(), torch.inference_mode():
        yield


def unwrap(output: Any) -> Tensor:
    """The hidden states a module returned: a tensor, a tuple or an output object, by version and module."""
    return output if isinstance(output, Tensor) else output[0]


def rewrap(output: Any, value: Tensor) -> Any:
    """What a module returned, with `value` as its hidden states."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # an output object of transformers
        return type(output)(**{**output, next(iter(output)): value})
    return (value, *output[1:])


@contextmanager
def captured(modules: Mapping[str, nn.Module], last: nn.Module | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what modules return, by their names, one entry a call.

    last: the module after which nothing is wanted any more: its call ends the forward pass that runs it, which then is
    to be made by `until_last`.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen[name].append(unwrap(output))

    def stop(*_args: Any) -> None:
        raise _LastSiteReached

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        if last is not None:
            stack.callback(last.register_forward_hook(stop).remove)
        yield seen


class _LastSiteReached(Exception):
    pass


def until_last(forward: Callable[..., Any], *args: Any) -> None:
    """Run a forward pass as far as the `last` module of `captured`."""
    with suppress(_LastSiteReached):
        forward(*args)


def checked(edit: "SiteEdit", acts: Tensor, site: str) -> Tensor:
    """What an edit makes of activations. Raises EqknobsError if their shape is another."""
    edited = edit(acts)
    if edited.shape != acts.shape:
        raise EqknobsError(f"the edit at {site} turned activations {list(acts.shape)} into {list(edited.shape)}")
    return edited.to(acts.dtype)


@contextmanager
def substituted(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the module return `change(hidden states)` in place of its own."""
    hook = module.register_forward_hook(lambda _module, _inputs, output: rewrap(output, change(unwrap(output))))
    try:
        yield
    finally:
        hook.remove()


def fit(wav: Tensor, samples: int) -> np.ndarray:
    """Trim a waveform, or pad it with zeros, to a number of samples; numpy [samples]."""
    return nn.functional.pad(wav[:samples], (0, max(0, samples - len(wav)))).cpu().numpy()


def convolution_reach(net: nn.Module, jump: int = 1) -> int:
    """Samples before (or after) its own hop that one output of a stack of convolutions can depend on.

    jump: samples that one input of the stack stands for.
    """
    reach = 0
    for module in net.modules():
        if isinstance(module, nn.Conv1d):
            reach += (module.kernel_size[0] - 1) * module.dilation[0] * jump
            jump *= module.stride[0]
        elif isinstance(module, nn.ConvTranspose1d):
            reach += (module.kernel_size[0] - 1) // module.stride[0] * jump
            jump //= module.stride[0]
    return reach


class Pretrained(ABC):
    """Base of the adapters; a subclass sets `net_class`, `sample_rate`, `sites` and adds `encode_sites`."""

    net_class: type
    net: Any  # a `net_class`
    config: Any  # its own
    sample_rate: int
    sites: dict[str, Site]
    n_codebooks = 0
    min_codebooks = 1
    decodes = gradients = False

    def __init__(self, cfg: ModelCfg):
        self.name = cfg["name"]
        self.device = pick_device(cfg.get("device") or "auto")
        self.net, self.revision = self._load(cfg)
        self.config = self.net.config
        if self.device == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # convolutions would otherwise lose half of float32's digits
        self.net.eval().requires_grad_(False).to(self.device)

    def _load(self, cfg: ModelCfg) -> tuple[Any, str]:
        """The network and its revision."""
        return load_pretrained(self.net_class, cfg)

    def resolve(self, *paths: str) -> str:
        """The first of these module paths that exists in the network (layouts move between versions)."""
        for path in paths:
            try:
                self.net.get_submodule(path)
                return path
            except AttributeError:
                continue
        raise EqknobsError(
            f"models.{self.name}: no module {paths[0]} in {type(self.net).__name__} of transformers "
            f"{transformers.__version__}; install the pinned version"
        )

    def site(self, name: str) -> Site:
        if name not in self.sites:
            raise EqknobsError(f"model {self.name} has no site {name!r}; its sites: {', '.join(self.sites)}")
        return self.sites[name]

    def frames(self, samples: int, site: str) -> int:
        return math.ceil(samples / self.site(site).hop)

    @abstractmethod
    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Activations [frames, width] at each site, from one pass over a waveform [samples]."""

    def encode(self, wav: np.ndarray, site: str) -> np.ndarray:
        """Activations [frames, width] at one site; see `encode_sites`."""
        return self.encode_sites(wav, [site])[site]

    @contextmanager
    def editing(self, site: str, edit: "SiteEdit") -> Iterator[None]:
        module = self.net.get_submodule(self.site(site).path)
        with substituted(module, lambda acts: checked(edit, acts, f"{self.name}.{site}")):
            yield

    def _modules(self, sites: Sequence[str]) -> dict[str, nn.Module]:
        """The modules of sites, in the network's order."""
        for name in sites:
            self.site(name)
        return {name: self.net.get_submodule(self.sites[name].path) for name in self.sites if name in sites}

    def decode(self, acts: np.ndarray, site: str, samples: int, codebooks: int | None = None) -> np.ndarray:
        raise EqknobsError(f"model {self.name} is an encoder: it cannot turn activations back into sound")

    def decode_batch(self, acts: Tensor, site: str, codebooks: int | None = None) -> Tensor:
        raise EqknobsError(f"model {self.name} is an encoder: it cannot turn activations back into sound")

    def reconstruct(self, wav: np.ndarray, codebooks: int | None = None) -> np.ndarray:
        raise EqknobsError(f"model {self.name} is an encoder: it cannot turn activations back into sound")

    def tokens(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        raise EqknobsError(f"model {self.name} has no codebooks")

    def decode_tokens(self, tokens: np.ndarray, samples: int) -> np.ndarray:
        raise EqknobsError(f"model {self.name} is an encoder: it cannot turn tokens into sound")

    def decoder_input(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        raise EqknobsError(f"model {self.name} is an encoder: it has no decoder that reads codes")

    def shuffle_weights(self, seed: int) -> None:
        """See `Model.shuffle_weights`; codebooks, which are buffers, too."""
        generator = torch.Generator().manual_seed(seed)
        buffers = [(name, tensor) for name, tensor in self.net.named_buffers() if "quantizer" in name]
        for _, tensor in [*self.net.named_parameters(), *buffers]:
            if tensor.is_floating_point() and tensor.ndim > 1:
                order = torch.randperm(tensor.numel(), generator=generator)
                tensor.copy_(tensor.detach().flatten().cpu()[order].reshape(tensor.shape))

    def _wave(self, wav: np.ndarray, block: int = 1) -> Tensor:
        """[samples] on the device, zero-padded on the right to a multiple of `block`."""
        if np.ndim(wav) != 1 or len(wav) == 0:
            raise EqknobsError(f"model {self.name} needs a mono waveform [samples], got shape {np.shape(wav)}")
        wave = torch.as_tensor(np.ascontiguousarray(wav, dtype=np.float32), device=self.device)
        return nn.functional.pad(wave, (0, -len(wave) % block))

    def _acts(self, acts: np.ndarray, site: str) -> Tensor:
        """[1, frames, width] on the device."""
        width = self.site(site).width
        if np.ndim(acts) != 2 or np.shape(acts)[1] != width:
            raise EqknobsError(f"{self.name}.{site} takes activations [frames, {width}], got {list(np.shape(acts))}")
        return torch.as_tensor(np.ascontiguousarray(acts, dtype=np.float32), device=self.device)[None]

    def _batch(self, acts: Tensor, site: str) -> Tensor:
        """[batch, frames, width] on the device."""
        width = self.site(site).width
        if acts.ndim != 3 or acts.shape[2] != width:
            raise EqknobsError(f"{self.name}.{site} takes batches [batch, frames, {width}], got {list(acts.shape)}")
        return acts.to(self.device, torch.float32)

    def _codebooks(self, codebooks: int | None) -> int:
        count = self.n_codebooks if codebooks is None else codebooks
        if not self.min_codebooks <= count <= self.n_codebooks:
            raise EqknobsError(
                f"model {self.name} takes {self.min_codebooks} to {self.n_codebooks} codebooks, not {count}"
            )
        return count


class ConvCodec(Pretrained):
    """A codec whose only site is `encoder`, the output [frames, width] of its convolutional encoder."""

    decodes = gradients = True
    chunk_seconds = 20.0

    def _set_site(self, hop: int, context: float) -> None:
        rate = self.sample_rate / hop
        path = self.resolve("encoder")
        self.sites = {"encoder": Site("encoder", path, self.config.hidden_size, hop, rate, context)}
        self._edits: list[SiteEdit] = []

    @contextmanager
    def editing(self, site: str, edit: "SiteEdit") -> Iterator[None]:
        """Not by a hook: the encoder runs in chunks that overlap, and the edit gets the whole clip once."""
        self.site(site)
        self._edits.append(edit)
        try:
            yield
        finally:
            self._edits.pop()

    def _in_chunks(self, stack: Callable[[Tensor], Tensor], wave: Tensor) -> Tensor:
        """Apply convolutions with one output a hop to [1, 1, samples]; equal to applying them at once."""
        hop = self.sites["encoder"].hop
        frames = wave.shape[-1] // hop
        step = max(1, round(self.chunk_seconds * self.sites["encoder"].frame_rate))
        context = math.ceil(convolution_reach(self.net.encoder) / hop) + 1
        out = []
        for start in range(0, frames, step):
            left = max(0, start - context)
            piece = stack(wave[..., left * hop : (start + step + context) * hop])
            out.append(piece[..., start - left : start - left + min(step, frames - start)])
        return torch.cat(out, dim=-1)

    def _encode(self, wave: Tensor) -> Tensor:
        return self._in_chunks(self.net.encoder, wave)

    def reconstruct(self, wav: np.ndarray, codebooks: int | None = None) -> np.ndarray:
        return self.decode(self.encode(wav, "encoder"), "encoder", len(wav), codebooks)

    @abstractmethod
    def _quantise(self, latents: Tensor, codebooks: int) -> tuple[Tensor, Tensor]:
        """Dequantised latents [1, width, frames] and codes [codebooks, frames]."""

    @abstractmethod
    def _dequantise(self, codes: Tensor) -> Tensor:
        """Latents [1, width, frames] of codes [codebooks, frames]."""

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        (site,) = self._modules(sites)
        with inference():
            wave = self._wave(wav, self.site(site).hop)
            acts = self._encode(wave[None, None]).transpose(1, 2)
            for edit in self._edits:
                acts = checked(edit, acts, f"{self.name}.{site}")
            return {site: acts[0].contiguous().cpu().numpy()}

    def decode(self, acts: np.ndarray, site: str, samples: int, codebooks: int | None = None) -> np.ndarray:
        """Waveform [samples]. Decoded in one piece, so memory grows with the clip."""
        with inference():
            latents = self._acts(acts, site).transpose(1, 2)
            if codebooks is not None:
                latents = self._quantise(latents, self._codebooks(codebooks))[0]
            return fit(self.net.decoder(latents)[0, 0], samples)

    def decode_batch(self, acts: Tensor, site: str, codebooks: int | None = None) -> Tensor:
        # cuDNN has gradients of recurrent layers (EnCodec's LSTM) in training only.
        with gpu_memory(), torch.backends.cudnn.flags(enabled=not acts.requires_grad):
            latents = self._batch(acts, site).transpose(1, 2)
            if codebooks is not None:
                latents = self._quantise(latents.detach(), self._codebooks(codebooks))[0]
            return self.net.decoder(latents)[:, 0]

    def tokens(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        with inference():
            return self._quantise(self._acts(acts, site).transpose(1, 2), self._codebooks(codebooks))[1].cpu().numpy()

    def decoder_input(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        with inference():
            latents = self._acts(acts, site).transpose(1, 2)
            if codebooks is not None:
                latents = self._quantise(latents, self._codebooks(codebooks))[0]
            return latents[0].T.contiguous().cpu().numpy()

    def decode_tokens(self, tokens: np.ndarray, samples: int) -> np.ndarray:
        with inference():
            return fit(self.net.decoder(self._dequantise(torch.as_tensor(tokens, device=self.device)))[0, 0], samples)


class LayeredEncoder(Pretrained):
    """An encoder-only model with sites `layer.<i>`, the outputs of its transformer layers."""

    def _set_sites(self, layers: str, count: int, width: int, hop: int, context: float) -> None:
        rate = self.sample_rate / hop
        self.sites = {
            f"layer.{i}": Site(f"layer.{i}", self.resolve(f"{layers}.{i}"), width, hop, rate, context)
            for i in range(count)
        }
