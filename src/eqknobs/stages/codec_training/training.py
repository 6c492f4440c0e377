"""Training of a small Mimi codec from a folder of speech, in transformers' own architecture and file format.

Two phases, because transformers' Mimi has no training path for its quantiser:

1. `train`: encoder and decoder end to end without the quantiser. Loss: multi-resolution spectrogram distance
   (Yamamoto et al. 2020, Parallel WaveGAN, with a mel-scaled logarithmic term as in Kumar et al. 2023, DAC). Isotropic
   noise on the latents of half the batch stands in for quantisation error and makes the latents compressible.
2. `fit_codebooks` (residual k-means on the latents), then everything is trained through the quantiser, a third of the
   batch with all codebooks, a third with a random number of them and a third without: the straight-through gradient and
   the commitment term of van den Oord et al. 2017, codebooks as exponential moving averages (their appendix A.1).
   Optionally (`adversarial`) against a discriminator: its hinge loss and the distance of its features are added.

`start` begins with the weights of an earlier export; with `steps` 0 its codebooks are kept and phase 2 follows at once.

Everything random is drawn from (seed, step), so the step number is the whole state of the data cursor and of the random
number generators, and on one machine a resumed run equals an uninterrupted one.
"""

import json
import os
import shutil
import types
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecFeatureExtractor, MimiConfig, MimiModel

from eqknobs.audio import read_samples
from eqknobs.corpus.files import walk
from eqknobs.device import pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path

WINDOWS = (1024, 512, 256, 128)  # samples
MEL_BANDS = (80, 64, 40, 20)
LOG_FLOOR = 3e-4  # of full scale: about 50 dB below speech at -23 dBFS

# ---------------------------------------------------------------- configuration


class AdversarialCfg(TypedDict):
    """The discriminator of the second phase."""

    channels: int  # its width
    crops: int  # of a batch, that it sees
    learning_rate: float
    hinge: float  # weights of the codec's two losses against it
    features: float


class CodecTrainingCfg(TypedDict):
    """What `train` reads: the section `codec_training`, the run's seed and the device."""

    seed: int
    data: dict[str, float]  # folder of mono speech at the model's rate -> its share of the crops
    description: str  # of the data
    voices_heard: NotRequired[list[str]]  # noted beside the weights
    voices_unheard: NotRequired[list[str]]
    model: dict[str, Any]  # arguments of transformers' MimiConfig
    batch: int  # crops
    seconds: float  # of a crop
    augment: float  # share of crops at another speed
    noise: float  # most noise on latents, in units of their RMS
    steps: int  # of the first phase
    learning_rate: float
    warmup: int  # steps, in each phase
    finetune_steps: int  # of the second phase
    finetune_learning_rate: float
    commitment: float  # weight of the commitment term
    codebook_decay: float  # of the codebooks' moving averages, a step
    semantic_dims: int  # principal directions of the semantic codebook
    kmeans_frames: int
    kmeans_iterations: int
    log_every: int  # steps
    export_every: int
    start: NotRequired[str]  # a folder that `train` wrote
    adversarial: NotRequired[AdversarialCfg | None]
    device: NotRequired[str]  # auto | cpu | cuda
    content: NotRequired[Any]  # digests, which decide when to train again, not how


# Not in training.json's `config`: they say where and on what, or have a place of their own there.
APART = ("content", "data", "device", "start", "voices_heard", "voices_unheard")

# ---------------------------------------------------------------- data


class Speech:
    """All speech below some folders in memory as 16-bit samples; one file in fifty is held out for validation.

    `shares` maps each folder to its share of the training crops. A file below two of the folders belongs to the inner
    one. Raises EqknobsError when a folder has no audio of its own, or a file has another rate than `rate` (Hz) or more
    than one channel.
    """

    def __init__(self, shares: dict[str, float], rate: int) -> None:
        owner: dict[Path, str] = {}
        for folder in sorted(shares, key=len):  # an inner folder's path is the longer one
            owner |= {p: folder for p in walk(Path(folder))[0] if p.suffix.lower() in (".wav", ".flac")}
        for folder in shares:
            if list(owner.values()).count(folder) < 2:
                raise EqknobsError(f"codec training: fewer than two .wav or .flac files below {folder}")
        files = sorted(owner)
        self.clips: list[np.ndarray] = []
        for path in files:
            audio, found = read_samples(path)  # float files too: read as integers, they would be silent
            if found != rate or audio.shape[1] != 1:
                raise EqknobsError(f"{path}: {found} Hz, {audio.shape[1]} channel(s); convert it to {rate} Hz mono")
            self.clips.append(np.clip(np.rint(audio[:, 0] * 32768), -32768, 32767).astype(np.int16))
        every = min(50, len(files))
        self.validation = self.clips[every - 1 :: every]
        kept = [i for i in range(len(self.clips)) if i % every != every - 1]
        self.training = [self.clips[i] for i in kept]
        owners = np.array([owner[files[i]] for i in kept])
        self.share = np.array([len(c) for c in self.training], dtype=np.float64)
        for folder, share in shares.items():
            mine = owners == folder
            self.share[mine] *= share / self.share[mine].sum() if mine.any() else 0.0
        self.share /= self.share.sum()
        self.minutes = sum(map(len, self.clips)) / rate / 60

    def batch(self, rng: np.random.Generator, size: int, samples: int, augment: float) -> Tensor:
        """Draws [size, 1, samples] float32 crops; within a folder a clip's chance is proportional to its length.

        `augment` is the share of crops played slower or faster by up to 20 % (which moves pitch and formants too).
        """
        crops = []
        for index in rng.choice(len(self.training), size, p=self.share):
            speed = rng.uniform(0.83, 1.2) if rng.random() < augment else 1.0
            crop = cut(self.training[index], rng.random(), round(samples * speed))
            crop = crop * 10 ** (rng.uniform(-6, 6) / 20)
            crops.append(F.interpolate(crop[None, None], samples, mode="linear")[0] if speed != 1.0 else crop[None])
        return torch.stack(crops)


def cut(clip: np.ndarray, where: float, samples: int) -> Tensor:
    """Returns `samples` float32 samples of a 16-bit clip starting at the share `where` of its range, zero-padded."""
    start = int(where * max(0, len(clip) - samples + 1))
    crop = torch.from_numpy(clip[start : start + samples].astype(np.float32) / 32768)
    return F.pad(crop, (0, samples - len(crop)))


# ---------------------------------------------------------------- model and loss


def new_model(config: dict[str, Any], seed: int) -> MimiModel:
    """Builds a MimiModel with unit-gain normal weights: variance 1 / fan-in for every convolution and linear layer.

    With PyTorch's default initialisation of the same layers the loss stands still for thousands of steps.
    """
    torch.manual_seed(seed)
    model = MimiModel(MimiConfig(**config))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.ConvTranspose1d):
                taps = module.kernel_size[0] / module.stride[0]
                module.weight.normal_(0, (module.in_channels / module.groups * taps) ** -0.5)
            elif isinstance(module, nn.Conv1d | nn.Linear):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and module.bias is not None:
                module.bias.zero_()
    return model


def hop(model: MimiModel) -> int:
    """Samples per code frame: the encoder's stride with its downsampling."""
    return round(model.config.sampling_rate / model.config.frame_rate)


def _channels_last(model: MimiModel) -> None:
    """Runs the convolutions as 2-d ones in channels-last order: equal but for rounding, a quarter faster on a CPU."""

    def layout(x: Tensor) -> Tensor:
        return x.unsqueeze(2).contiguous(memory_format=torch.channels_last)

    def conv(self: nn.Conv1d, x: Tensor) -> Tensor:
        stride, dilation = (1, self.stride[0]), (1, self.dilation[0])
        return F.conv2d(layout(x), self.weight.unsqueeze(2), self.bias, stride, 0, dilation, self.groups).squeeze(2)

    def transposed(self: nn.ConvTranspose1d, x: Tensor) -> Tensor:
        weight = self.weight.unsqueeze(2)
        return F.conv_transpose2d(layout(x), weight, self.bias, (1, self.stride[0]), groups=self.groups).squeeze(2)

    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            vars(module)["forward"] = types.MethodType(conv, module)
        elif isinstance(module, nn.ConvTranspose1d):
            vars(module)["forward"] = types.MethodType(transposed, module)


class SpectralLoss(nn.Module):
    """Mean over window lengths of the relative L1 distance of magnitudes plus the L1 distance of log-mel magnitudes."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        import librosa

        for window, bands in zip(WINDOWS, MEL_BANDS, strict=True):
            taper = torch.hann_window(window)
            self.register_buffer(f"taper{window}", taper / taper.square().sum().sqrt())
            mel = librosa.filters.mel(sr=rate, n_fft=window, n_mels=bands, norm=None)
            mel = mel / np.maximum(mel.sum(1, keepdims=True), 1e-9)  # a band's mean magnitude
            self.register_buffer(f"mel{window}", torch.from_numpy(mel.astype(np.float32)))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the scalar loss of `output` against `target`, both [batch, 1, samples]."""
        both = torch.cat([output, target]).squeeze(1)
        losses = []
        for window in WINDOWS:
            taper, mel = getattr(self, f"taper{window}"), getattr(self, f"mel{window}")
            spectrum = torch.stft(both, window, window // 4, window=taper, return_complex=True)
            magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-10).sqrt()
            a, b = magnitude.chunk(2)
            log_a, log_b = (mel @ magnitude + LOG_FLOOR).log().chunk(2)
            losses.append((a - b).abs().mean() / b.mean() + (log_a - log_b).abs().mean())
        return torch.stack(losses).mean()


class Discriminator(nn.Module):
    """Tells speech from its reconstruction: convolutions over complex STFTs of three window lengths.

    The multi-scale STFT discriminator of EnCodec (Défossez et al. 2022, section 3.4) with fewer channels and dilations.
    """

    windows = (1024, 512, 256)  # samples

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        norm = nn.utils.parametrizations.weight_norm
        self.stacks = nn.ModuleList()
        for window in self.windows:
            self.register_buffer(f"taper{window}", torch.hann_window(window) / (window * 0.375) ** 0.5)
            layers = [norm(nn.Conv2d(2, channels, (9, 3), (2, 1), (4, 1)))]
            for dilation in (1, 2):
                layers.append(norm(nn.Conv2d(channels, channels, (9, 3), (2, 1), (4, dilation), (1, dilation))))
            layers.append(norm(nn.Conv2d(channels, 1, 3, 1, 1)))
            self.stacks.append(nn.ModuleList(layers))

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """Returns for each window the feature maps of audio [batch, 1, samples]; the last one holds the logits."""
        found = []
        for window, layers in zip(self.windows, self.stacks, strict=True):
            taper = getattr(self, f"taper{window}")
            spectrum = torch.stft(audio.squeeze(1), window, window // 4, window=taper, return_complex=True)
            x = torch.view_as_real(spectrum).movedim(-1, 1)
            # Compressed to the power 0.3, or the loudest partials would be all that it sees.
            x = x * (x.square().sum(1, keepdim=True) + 1e-6) ** -0.35
            maps = []
            for number, layer in enumerate(cast(nn.ModuleList, layers)):
                x = layer(x if not number else F.leaky_relu(x, 0.2))
                maps.append(x)
            found.append(maps)
        return found


def discriminator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """The hinge loss that the discriminator minimises (scalar)."""
    pairs = [(r[-1], f[-1]) for r, f in zip(real, fake, strict=True)]
    return torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in pairs]).mean()


def generator_losses(real: list[list[Tensor]], fake: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """What the codec minimises: the hinge term, and the relative L1 distance of the features (two scalars)."""
    hinge = torch.stack([F.relu(1 - f[-1]).mean() for f in fake]).mean()
    pairs = [(r.detach(), f) for a, b in zip(real, fake, strict=True) for r, f in zip(a[:-1], b[:-1], strict=True)]
    return hinge, torch.stack([(r - f).abs().mean() / r.abs().mean() for r, f in pairs]).mean()


def encode(model: MimiModel, audio: Tensor) -> Tensor:
    """Returns the continuous latents [batch, width, frames] at the code rate of audio [batch, 1, samples]."""
    if "downsample" in model._modules:  # transformers before 5.21
        hidden = model.encoder_transformer(model.encoder(audio).transpose(1, 2))[0]
        return model.downsample(hidden.transpose(1, 2))
    return model.encoder(audio).latents


def decode(model: MimiModel, latents: Tensor) -> Tensor:
    """Returns audio [batch, 1, samples] from latents [batch, width, frames] at the code rate."""
    if "upsample" in model._modules:  # transformers before 5.21
        hidden = model.decoder_transformer(model.upsample(latents).transpose(1, 2))[0]
        return model.decoder(hidden.transpose(1, 2))
    return model.decoder(latents).audio_values


def quantise(model: MimiModel, latents: Tensor, codebooks: int) -> Tensor:
    """Returns the latents [batch, width, frames] as the first `codebooks` codebooks represent them."""
    codes = model.quantizer.encode(latents, codebooks)
    return model.quantizer.decode(codes.transpose(0, 1))


def quantise_straight_through(
    model: MimiModel, latents: Tensor, codebooks: int, decay: float | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises as `quantise` does, with the gradient passed straight through each quantiser's projected latents.

    latents is [batch, width, frames]; returns the quantised latents of the same shape and the commitment term, the mean
    square of what the codebooks leave relative to the projected latents' own (scalar). With `decay` the codebooks move
    towards what they were chosen for, as exponential moving averages of that decay a step.
    """
    quantizer = model.quantizer
    semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    depth = min(codebooks, quantizer.num_semantic_quantizers)
    out, left, power = torch.zeros_like(latents), latents.new_zeros(()), latents.new_zeros(())
    for part, used in ((semantic, depth), (acoustic, codebooks - depth)):
        if not used:
            continue
        projected = part.input_proj(latents)
        rows = projected.detach().transpose(1, 2).flatten(0, 1)
        residual = rows
        for layer in part.layers[:used]:
            book = layer.codebook
            chosen = book.quantize(residual)
            found = book.embed[chosen]
            if decay is not None:
                move_codebook(book, residual, chosen, decay)
            residual = residual - found
        quantised = (rows - residual).unflatten(0, (len(latents), -1)).transpose(1, 2)
        out = out + part.output_proj(projected + (quantised - projected).detach())
        left = left + (projected - quantised).square().mean()
        power = power + projected.detach().square().mean()
    return out, left / power


@torch.no_grad()
def move_codebook(book: Any, rows: Tensor, chosen: Tensor, decay: float) -> None:
    """Moves a codebook's entries towards the rows [n, dims] that chose them (indices [n]): one step of the average.

    `book` is transformers' MimiEuclideanCodebook.
    """
    one_hot = F.one_hot(chosen, book.codebook_size).to(rows.dtype)
    book.cluster_usage.mul_(decay).add_(one_hot.sum(0), alpha=1 - decay)
    book.embed_sum.mul_(decay).add_(one_hot.T @ rows, alpha=1 - decay)
    book._embed = None  # transformers caches the quotient of the two buffers


# ---------------------------------------------------------------- codebooks


@torch.no_grad()
def fit_codebooks(model: MimiModel, latents: Tensor, semantic_dims: int, iterations: int, seed: int) -> list[float]:
    """Fits projections and codebooks in place on latents [frames, width]; returns the error left after each codebook.

    Mimi's semantic and acoustic quantisers both see the latents and their outputs are added, so the two must share the
    space out: the semantic one takes the first `semantic_dims` principal directions (uncentred, because the projections
    have no bias), the acoustic one the directions after them. Errors are mean squares relative to the latents' own.
    """
    from sklearn.cluster import KMeans

    latents, device = latents.cpu(), model.device
    quantizer = model.quantizer.cpu()  # scikit-learn's k-means runs there
    frames, entries = len(latents), model.config.codebook_size
    if frames < entries:
        raise EqknobsError(f"codebooks: {frames} latent frames for {entries} entries; give more speech")
    _, directions = torch.linalg.eigh(latents.double().T @ latents.double())
    directions = directions.flip(1).T.float()  # [width, width], strongest first
    width = model.config.vector_quantization_hidden_dimension
    stages = [
        (quantizer.semantic_residual_vector_quantizer, directions[:semantic_dims]),
        (quantizer.acoustic_residual_vector_quantizer, directions[semantic_dims : semantic_dims + width]),
    ]
    remaining = latents.clone()
    errors = []
    for residual_quantizer, basis in stages:
        projection = F.pad(basis, (0, 0, 0, width - len(basis)))
        residual_quantizer.input_proj.weight.copy_(projection[:, :, None])
        residual_quantizer.output_proj.weight.copy_(projection.T[:, :, None])
        residual = latents @ projection.T
        for number, layer in enumerate(residual_quantizer.layers):
            fit = KMeans(entries, init="random", n_init=1, max_iter=iterations, random_state=seed + number)
            fit.fit(residual[:, : len(basis)].numpy())
            centres = torch.from_numpy(fit.cluster_centers_)
            layer.codebook.embed_sum.copy_(F.pad(centres, (0, width - len(basis))))
            layer.codebook.cluster_usage.fill_(1)
            layer.codebook._embed = None  # transformers caches the quotient of the two buffers
            chosen = layer.codebook.embed[layer.codebook.quantize(residual)]
            residual = residual - chosen
            remaining = remaining - chosen @ projection
            errors.append((remaining.square().mean() / latents.square().mean()).item())
    quantizer.to(device)
    return errors


@torch.no_grad()
def latent_frames(model: MimiModel, clips: list[np.ndarray], limit: int) -> Tensor:
    """Returns up to `limit` latent frames [frames, width] of whole clips taken evenly from the list."""
    size = hop(model)
    found, count = [], 0
    order = np.random.default_rng(0).permutation(len(clips))
    for index in order:
        samples = -(-len(clips[index]) // size) * size
        clip = cut(clips[index], 0, samples)[None, None]
        found.append(encode(model, clip.to(model.device))[0].T.cpu())
        count += len(found[-1])
        if count >= limit:
            break
    return torch.cat(found)[:limit]


# ---------------------------------------------------------------- training


def train(cfg: CodecTrainingCfg, out: str | Path, checkpoint: str | Path, stop_after: int | None = None) -> None:
    """Trains a codec and writes it to the folder `out`, resuming from the file `checkpoint` where it exists.

    `stop_after` ends the run early at that step (after a checkpoint). Raises EqknobsError on bad audio, a checkpoint or
    a start of another configuration, or a loss that is not finite.
    """
    out, checkpoint = Path(out), Path(checkpoint)
    training = Training(cfg)
    if checkpoint.exists():
        training.resume(checkpoint)
    for step in range(training.done, training.total):
        training.step(step)
        done = training.done
        if done % cfg["log_every"] == 0 or done in (cfg["steps"], training.total, stop_after):
            training.record()
            training.save(checkpoint)
        if done % cfg["export_every"] == 0 or done == training.total:
            export(training.model, out, training.facts(), training.log)
        if done == stop_after:
            return


class Adversary:
    """A discriminator in training, and what the codec's loss has from it."""

    def __init__(self, cfg: AdversarialCfg, seed: int, device: str) -> None:
        self.cfg = cfg
        self.net = Discriminator(cfg["channels"], seed).to(device)
        self.optimizer = _adam(self.net)

    def step(self, real: Tensor, fake: Tensor, pace: float) -> tuple[Tensor, Tensor]:
        """One step at `pace` times the learning rate on audio [crops, 1, samples]; then the codec's two weighted losses
        (scalars)."""
        self.optimizer.param_groups[0]["lr"] = pace * self.cfg["learning_rate"]
        self.optimizer.zero_grad()
        discriminator_loss(self.net(real), self.net(fake.detach())).backward()
        self.optimizer.step()
        self.net.requires_grad_(False)
        hinge, features = generator_losses(self.net(real), self.net(fake))
        self.net.requires_grad_(True)
        return self.cfg["hinge"] * hinge, self.cfg["features"] * features


class Training:
    """A codec in training: everything that a run changes.

    Attributes `model`, `done` (of `total` steps), `log` (a record every `log_every` steps), `errors` (what codebooks
    leave; empty until they are fitted) and `before` (the training.json of the start). Raises EqknobsError on bad
    audio, a start of another architecture, or none where the first phase is left out.
    """

    def __init__(self, cfg: CodecTrainingCfg) -> None:
        self.cfg, self.device = cfg, pick_device(cfg.get("device", "auto"))
        self.model = new_model(cfg["model"], cfg["seed"]).to(self.device)
        self.speech = Speech(cfg["data"], self.model.config.sampling_rate)
        self.samples = max(1, round(cfg["seconds"] * self.model.config.frame_rate)) * hop(self.model)
        _channels_last(self.model)
        self.loss_of = SpectralLoss(self.model.config.sampling_rate).to(self.device)
        self.optimizer = _adam(self.model)
        self.total = cfg["steps"] + cfg["finetune_steps"]
        self.done = 0
        self.log: list[dict[str, Any]] = []
        self.errors: list[float] = []
        self.before: dict[str, Any] = {}
        self._losses: list[float] = []  # since the last record
        if "start" in cfg:
            self.before = begin_with(self.model, Path(cfg["start"]))
            self.errors = [] if cfg["steps"] else self.before["residual_power_after_codebooks"]
        elif not cfg["steps"]:
            raise EqknobsError("codec_training.steps: 0 needs a start, whose codebooks are trained on")
        adversarial = cfg.get("adversarial")
        self.adversary = Adversary(adversarial, cfg["seed"], self.device) if adversarial else None

    def _identity(self) -> str:
        return json.dumps(self.cfg["model"] | {"seed": self.cfg["seed"]}, sort_keys=True)

    def resume(self, checkpoint: Path) -> None:
        """Takes the state from a checkpoint. Raises EqknobsError if it belongs to another model or seed."""
        state = torch.load(checkpoint, weights_only=True, map_location=self.device)
        if state["identity"] != self._identity():
            raise EqknobsError(f"{checkpoint}: belongs to another model or seed; delete it or name another checkpoint")
        self.done, self.log, self.errors = state["step"], state["log"], state["errors"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary and "judge" in state:
            self.adversary.net.load_state_dict(state["judge"])
            self.adversary.optimizer.load_state_dict(state["judge_optimizer"])

    def save(self, checkpoint: Path) -> None:
        """Writes the state, atomically."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.done, "log": self.log}
        if self.adversary:
            state |= {"judge": self.adversary.net.state_dict()}
            state |= {"judge_optimizer": self.adversary.optimizer.state_dict()}
        with atomic_path(checkpoint) as temporary:
            torch.save(state | {"errors": self.errors, "identity": self._identity()}, temporary)

    def step(self, step: int) -> None:
        """One step of the optimiser; before the second phase's first, the codebooks are fitted.

        Raises EqknobsError if the loss is not finite.
        """
        cfg, second = self.cfg, step >= self.cfg["steps"]
        if second and not self.errors:
            self._fit_codebooks()
        rate = learning_rate(cfg, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([cfg["seed"], step])
        audio = self.speech.batch(rng, cfg["batch"], self.samples, cfg["augment"]).to(self.device)
        latents, commitment = encode(self.model, audio), torch.zeros((), device=self.device)
        if second:
            latents, commitment = _partly_quantised(self.model, latents, rng, cfg["codebook_decay"])
        else:
            latents = _noisy(latents, rng, cfg["noise"])
        output = decode(self.model, latents)
        loss = self.loss_of(output, audio)
        if not torch.isfinite(loss):
            raise EqknobsError(f"codec training: the loss is not finite at step {step}; lower the learning rate")
        whole = loss + cfg["commitment"] * commitment
        if self.adversary and second:
            seen = torch.from_numpy(rng.permutation(len(audio))[: self.adversary.cfg["crops"]]).to(self.device)
            for term in self.adversary.step(audio[seen], output[seen], rate / cfg["finetune_learning_rate"]):
                whole = whole + term
        self.optimizer.zero_grad()
        whole.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self._losses.append(loss.item())
        self.done = step + 1

    def _fit_codebooks(self) -> None:
        cfg = self.cfg
        latents = latent_frames(self.model, self.speech.training, cfg["kmeans_frames"])
        self.errors = fit_codebooks(self.model, latents, cfg["semantic_dims"], cfg["kmeans_iterations"], cfg["seed"])
        self.optimizer = _adam(self.model)
        print(f"all {len(self.errors)} codebooks leave {self.errors[-1]:.3f} of the latents' power", flush=True)

    def record(self) -> None:
        """Measures on held-out clips, adds a record to the log and prints it."""
        step = self.done - 1
        phase = "codec" if step < self.cfg["steps"] else "quantiser"
        rate, mean = learning_rate(self.cfg, step), float(np.mean(self._losses))
        measured = validate(self.model, self.speech.validation, self.samples, self.loss_of, quantised=bool(self.errors))
        self.log.append({"step": self.done, "phase": phase, "learning_rate": rate, "train": mean} | measured)
        self._losses = []
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.log[-1].items()), flush=True)

    def facts(self) -> dict[str, Any]:
        """What training.json says."""
        facts = {
            "config": {key: value for key, value in self.cfg.items() if key not in APART},
            "clips": len(self.speech.clips),
            "minutes": round(self.speech.minutes, 2),
            "steps_done": self.done,
            "residual_power_after_codebooks": [round(e, 5) for e in self.errors],
        }
        facts |= {key: value for key, value in self.cfg.items() if key.startswith("voices_")}
        return facts | ({"before": self.before} if self.before else {})


def begin_with(model: MimiModel, folder: Path) -> dict[str, Any]:
    """Loads the weights of an exported codec; returns its training.json.

    Raises EqknobsError if the folder holds no export of this function's, or one of another architecture.
    """
    try:
        found = MimiModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        before = json.loads((folder / "training.json").read_text())
        model.load_state_dict(found.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise EqknobsError(f"codec_training.start: {folder} is no codec of this architecture ({reason})") from error
    return before


def _adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), betas=(0.8, 0.99))


def learning_rate(cfg: CodecTrainingCfg, step: int) -> float:
    """Linear warm-up then cosine decay to 2 % of the peak, anew in each of the two phases."""
    if step < cfg["steps"]:
        peak, share = cfg["learning_rate"], step / cfg["steps"]
    else:
        peak, share = cfg["finetune_learning_rate"], (step - cfg["steps"]) / cfg["finetune_steps"]
    start = step if step < cfg["steps"] else step - cfg["steps"]
    return peak * min(1.0, (start + 1) / cfg["warmup"]) * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * share))))


def _noisy(latents: Tensor, rng: np.random.Generator, most: float) -> Tensor:
    """Adds noise to the second half of the batch [batch, width, frames], up to `most` times the latents' RMS."""
    level = torch.from_numpy(rng.uniform(0, most, (len(latents), 1, 1)).astype(np.float32))
    level[: len(latents) // 2] = 0
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)).to(latents.device)
    return latents + level.to(latents.device) * latents.square().mean().sqrt() * noise


def _partly_quantised(
    model: MimiModel, latents: Tensor, rng: np.random.Generator, decay: float
) -> tuple[Tensor, Tensor]:
    """Leaves a third of the batch as it is, quantises a third with all codebooks and a third with 4 or more of them.

    Returns the latents and the sum of the commitment terms.
    """
    third = -(-len(latents) // 3)
    plain, full, some = latents[:third], latents[third : 2 * third], latents[2 * third :]
    most = model.config.num_quantizers
    parts, commitment = [plain], latents.new_zeros(())
    for part, codebooks in ((full, most), (some, int(rng.integers(min(4, most), most + 1)))):
        if len(part):
            quantised, term = quantise_straight_through(model, part, codebooks, decay)
            parts.append(quantised)
            commitment = commitment + term
    return torch.cat(parts), commitment


@torch.no_grad()
def validate(
    model: MimiModel, clips: list[np.ndarray], samples: int, loss_of: SpectralLoss, quantised: bool
) -> dict[str, float]:
    """Returns the loss on the middle of up to 16 held-out clips: `unquantised`, and `quantised` with all codebooks."""
    audio = torch.stack([cut(c, 0.5, samples)[None] for c in clips[:16]]).to(model.device)
    latents = encode(model, audio)
    result = {"unquantised": loss_of(decode(model, latents), audio).item(), "quantised": float("nan")}
    if quantised:
        full = quantise(model, latents, model.config.num_quantizers)
        result["quantised"] = loss_of(decode(model, full), audio).item()
    return result


def export(model: MimiModel, out: Path, facts: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """Writes a folder that MimiModel.from_pretrained and AutoFeatureExtractor load, with training.json and log.csv.

    Weights are stored in half precision. Files of `out` that this function does not write stay as they are.
    """
    plain = MimiModel(model.config)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    for module in plain.modules():
        if hasattr(module, "embed_sum"):  # a running sum and count: half precision holds their quotient better
            module.embed_sum.copy_(module.embed)
            module.cluster_usage.fill_(1)
    with atomic_path(out.with_name(f"{out.name}.new")) as temporary:
        plain.half().save_pretrained(temporary)
        EncodecFeatureExtractor(sampling_rate=model.config.sampling_rate, return_attention_mask=True).save_pretrained(
            temporary
        )
        (temporary / "training.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        pd.DataFrame(log).to_csv(temporary / "log.csv", index=False, float_format="%.6g", lineterminator="\n")
    out.mkdir(parents=True, exist_ok=True)
    finished = out.with_name(f"{out.name}.new")
    for path in sorted(finished.iterdir()):
        path.chmod(0o644)
        os.replace(path, out / path.name)
    shutil.rmtree(finished)
