"""The sparse-autoencoder trainers that `sae_training.py` compares, each driven the way its own library drives it.

Peers are imported where they are built, so that this module needs none of them. Everybody gets the learning rate that
suits it best (`LEARNING_RATE`, from `sae_training.py --sweep`), held constant, and no warm-up: runs this short would
end inside the peers' default of 1000 steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from eqknobs.sae import make_config
from eqknobs.sae.training import Trainer

FOREVER = 10**9  # steps of a run whose learning rate shall not fall yet
LONG_AGO = 2**40  # frames or steps since a feature fired that make it dead for every library
SLEEP = 0.1  # scale of a dead feature's encoder row: its activations stay far below the k largest
LEARNING_RATE = {
    ("eqknobs", "topk"): 3e-3,
    ("eqknobs", "batchtopk"): 3e-3,
    ("eqknobs", "jumprelu"): 1e-3,
    ("eqknobs", "rms_l1"): 1e-3,
    ("dictionary-learning", "topk"): 3e-3,
    ("dictionary-learning", "batchtopk"): 1e-2,
    ("dictionary-learning", "jumprelu"): 1e-3,
    ("dictionary-learning", "standard"): 1e-3,
    ("sae-lens", "topk"): 3e-3,
    ("sae-lens", "topk-sparse"): 3e-3,
    ("sae-lens", "batchtopk"): 3e-3,
    ("sae-lens", "jumprelu"): 1e-3,
    ("sae-lens", "standard"): 1e-3,
    ("eai-sparsify", "topk"): 3e-3,
}
L1 = {"eqknobs": 1.0, "dictionary-learning": 1.0, "sae-lens": 1.0}  # λ beside a squared error summed over the width


@dataclass(frozen=True)
class Task:
    """What is trained: d-wide latents, `features` of them, `batch` frames a step, k active on a frame."""

    d: int
    features: int
    batch: int
    k: int
    lr: float | None = None  # instead of LEARNING_RATE
    device: str = "cpu"


class Contestant(ABC):
    """One trainer of one library. `variant` may end in `+auxk`: then AuxK is on and half of the features are dead."""

    library: ClassVar[str]
    weights: Tensor  # encoder rows of the features, a view [features, d] of the trained parameter
    idle: Tensor  # what the library counts since each feature fired [features]
    dead_after: float  # idle from which on a feature is dead

    def __init__(self, task: Task, variant: str, data: Any):
        self.task, self.variant = task, variant
        self.kind, _, aux = variant.partition("+")
        self.aux = aux == "auxk"
        self.lr = task.lr or LEARNING_RATE[self.library, self.kind]
        self.steps = 0
        self.build(data)
        half = task.features // 2
        self._asleep = self.weights[:half].detach().clone() * SLEEP if self.aux else None

    @abstractmethod
    def build(self, data: Any) -> None:
        """Make the library's own trainer; `data` has `raw` (train frames), `mean` and `std`."""

    @abstractmethod
    def step(self, raw: Tensor, z: Tensor) -> None:
        """One full training step on a batch [B, d]: raw latents and the same z-scored; each library takes its own."""

    @abstractmethod
    def code(self, z: Tensor) -> Tensor:
        """Codes [N, features] of z-scored latents [N, d], chosen as in training: L0 is k where the variant has a k."""

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """z-scored reconstruction [N, d] of codes."""

    @torch.no_grad()
    def put_to_sleep(self) -> None:
        """Before a step with AuxK: make the first half of the features dead again, however the last step woke them."""
        if self._asleep is not None:
            self.weights[: len(self._asleep)] = self._asleep
            self.idle[: len(self._asleep)] = LONG_AGO

    def dead(self) -> int:
        """Features that count as dead now."""
        return int((self.idle >= self.dead_after).sum())


class Eqknobs(Contestant):
    library = "eqknobs"

    def build(self, data: Any) -> None:
        task = self.task
        own: dict[str, dict[str, Any]] = {
            "topk": {"k": task.k},
            "batchtopk": {"k": task.k},
            "jumprelu": {"l0": task.k},
            "rms_l1": {"l1": L1[self.library], "l1_on": "h"},
        }
        values = own[self.kind] | {"variant": self.kind, "d_in": task.d, "d_sae": task.features, "lr": self.lr}
        values |= {"batch_size": task.batch} | ({"aux_k": task.d // 2} if self.aux else {})
        self.trainer = Trainer(
            make_config(values), data.mean.cpu(), data.std.cpu(), len(data.raw), FOREVER, task.device
        )
        self.trainer.start(data.raw[:4096].cpu().numpy())
        self.weights, self.idle = self.trainer.sae.W_enc, self.trainer.idle
        self.dead_after = 2 * len(data.raw)

    def step(self, raw: Tensor, z: Tensor) -> None:
        self.trainer.step(raw)

    def code(self, z: Tensor) -> Tensor:
        sae = self.trainer.sae
        if self.kind == "batchtopk":  # its threshold is set at the end of an epoch
            h = torch.relu(sae._pre(z))
            return h * sae._mask(h)
        return sae._code(z)

    def decode(self, code: Tensor) -> Tensor:
        return self.trainer.sae._reconstruct(code)


class DictionaryLearning(Contestant):
    library = "dictionary-learning"

    def build(self, data: Any) -> None:
        from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, StandardTrainer, TopKTrainer

        task = self.task
        shared = {"steps": FOREVER, "activation_dim": task.d, "dict_size": task.features, "layer": 0, "lm_name": "none"}
        shared |= {"lr": self.lr, "warmup_steps": 0, "seed": 0, "device": task.device}
        top = {"k": task.k, "auxk_alpha": 1 / 32 if self.aux else 0}
        l1 = {"l1_penalty": L1[self.library], "sparsity_warmup_steps": None}
        self.trainer = {
            "topk": lambda: TopKTrainer(**shared, **top),
            "batchtopk": lambda: BatchTopKTrainer(**shared, **top),
            "jumprelu": lambda: JumpReluTrainer(**shared, target_l0=task.k, sparsity_warmup_steps=None),
            "standard": lambda: StandardTrainer(**shared, **l1),
        }[self.kind]()
        ae = self.trainer.ae
        self.weights = ae.W_enc.T if self.kind == "jumprelu" else ae.encoder.weight
        self.idle = getattr(self.trainer, "num_tokens_since_fired", torch.zeros(0))
        self.dead_after = getattr(self.trainer, "dead_feature_threshold", np.inf)

    def step(self, raw: Tensor, z: Tensor) -> None:
        self.trainer.update(self.steps, z)
        self.steps += 1

    def code(self, z: Tensor) -> Tensor:
        ae = self.trainer.ae
        return ae.encode(z, use_threshold=False) if self.kind == "batchtopk" else ae.encode(z)

    def decode(self, code: Tensor) -> Tensor:
        return self.trainer.ae.decode(code)


class SaeLens(Contestant):
    library = "sae-lens"

    def build(self, data: Any) -> None:
        from sae_lens import (
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            JumpReLUTrainingSAE,
            JumpReLUTrainingSAEConfig,
            StandardTrainingSAE,
            StandardTrainingSAEConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        task = self.task
        torch.manual_seed(0)
        shared = {"d_in": task.d, "d_sae": task.features}
        top = {"k": task.k}
        # On a CPU its sparse codes have a backward pass only without the rescaling.
        sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        jump = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": task.k}
        sae = {
            "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**shared, **top)),
            "topk-sparse": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**shared, **top, **sparse)),
            "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared, **top)),
            "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shared, **jump)),
            "standard": lambda: StandardTrainingSAE(
                StandardTrainingSAEConfig(**shared, l1_coefficient=L1[self.library])
            ),
        }[self.kind]().to(task.device)
        config = SAETrainerConfig(FOREVER * task.batch, task.batch, lr=self.lr, lr_end=self.lr)
        self.trainer = SAETrainer(config, sae, iter(()))
        self.weights, self.idle = sae.W_enc.T, self.trainer.n_forward_passes_since_fired
        self.dead_after = config.dead_feature_window + 1

    def step(self, raw: Tensor, z: Tensor) -> None:
        self.trainer.step(z)
        self.trainer.n_training_steps += 1

    def code(self, z: Tensor) -> Tensor:
        return self.trainer.sae.encode(z).to_dense()

    def decode(self, code: Tensor) -> Tensor:
        return self.trainer.sae.decode(code)


class Sparsify(Contestant):
    """The body of `sparsify.Trainer.fit`, call by call: the method itself can only be fed from a language model."""

    library = "eai-sparsify"

    def build(self, data: Any) -> None:
        from sparsify import SparseCoder, SparseCoderConfig
        from transformers import get_linear_schedule_with_warmup

        task = self.task
        torch.manual_seed(0)
        config = SparseCoderConfig(num_latents=task.features, k=task.k)
        self.coder = SparseCoder(task.d, config, device=task.device, dtype=torch.float32)
        self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=self.lr)
        self.schedule = get_linear_schedule_with_warmup(self.optimiser, 0, FOREVER)
        self.fired = torch.zeros(task.features, dtype=torch.bool)
        self.idle = torch.zeros(task.features, dtype=torch.long)
        self.weights, self.dead_after = self.coder.encoder.weight, 10_000_001

    def step(self, raw: Tensor, z: Tensor) -> None:
        coder = self.coder
        if self.steps == 0:
            coder.b_dec.data = z.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        dead = self.idle >= self.dead_after if self.aux else None
        variance = (z - z.mean(0)).pow(2).sum()
        out = coder(x=z, y=z, dead_mask=dead, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        alpha = 1 / 32 if self.aux else 0.0
        (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        self.idle += len(z)
        self.idle[self.fired] = 0
        self.fired.zero_()
        self.steps += 1

    def code(self, z: Tensor) -> Tensor:
        values, places, pre = self.coder.encode(z)
        return torch.zeros_like(pre).scatter_(1, places, values)

    def decode(self, code: Tensor) -> Tensor:
        return code @ self.coder.W_dec + self.coder.b_dec


TOP = ("topk", "topk+auxk")
BATCH_TOP = ("batchtopk", "batchtopk+auxk")
OFFERS: dict[type[Contestant], tuple[str, ...]] = {
    Eqknobs: (*TOP, *BATCH_TOP, "jumprelu", "rms_l1"),
    DictionaryLearning: (*TOP, *BATCH_TOP, "jumprelu", "standard"),
    SaeLens: (*TOP, "topk-sparse", *BATCH_TOP, "jumprelu", "standard"),
    Sparsify: TOP,
}
MODULES = {"dictionary-learning": "dictionary_learning.trainers", "sae-lens": "sae_lens", "eai-sparsify": "sparsify"}
FAMILIES = {
    "topk-sparse": "topk",
    "rms_l1": "l1",
    "standard": "l1",
}  # variants with another name for what they are compared with


def family(variant: str) -> str:
    """What a variant is compared with."""
    return FAMILIES.get(variant, variant)


def makers(libraries: list[str], families: list[str]) -> dict[tuple[str, str], Callable[[Task, Any], Contestant]]:
    """(library, variant) -> what builds it, for libraries by name and families of variants."""
    return {
        (kind.library, variant): lambda task, data, kind=kind, variant=variant: kind(task, variant, data)
        for kind, variants in OFFERS.items()
        for variant in variants
        if kind.library in libraries and family(variant) in families
    }


def installed_version(library: str) -> str:
    """A library's version as its package names it."""
    return version(library)
