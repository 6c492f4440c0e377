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
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import EncodecFeatureExtractor, MimiModel

from eqknobs.device import pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.stages.codec_training.codebooks import fit_codebooks, latent_frames, quantise, quantise_straight_through
from eqknobs.stages.codec_training.data import Speech, cut
from eqknobs.stages.codec_training.losses import Discriminator, SpectralLoss, discriminator_loss, generator_losses
from eqknobs.stages.codec_training.network import channels_last, decode, encode, hop, new_model


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
        channels_last(self.model)
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
