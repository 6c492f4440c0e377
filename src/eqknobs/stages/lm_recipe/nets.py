"""The networks of the conditions: heads taken out, trained again, the depformer shortened, packed.

Training data: `distilled`, the intact model's own answers to sentences of part train; `sentences`, recorded clips of
that part. Weights are rounded to half precision after training, as their file holds them, so that what is judged is
what is written.
"""

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import load_net
from eqknobs.models.moshi.interventions import remove_codebooks, remove_heads
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.packing.modules import faked, pack_modules
from eqknobs.packing.plan import Plan, mean_bits, packable, plan_bytes
from eqknobs.pieces import Pieces
from eqknobs.speaking import grammar
from eqknobs.speaking.answers import Answer, frame_seconds, speak
from eqknobs.speaking.bench import SpokenCfg, digest, kept_answers, sampling
from eqknobs.speaking.clips import Clip, Sequences, collate
from eqknobs.speaking.prompts import Asked, Sentences
from eqknobs.stages.lm_recipe.plan import INTACT, NONE, Condition, Head
from eqknobs.stages.speech_lm_training.training import SpeechLMTrainingCfg, adam, batch_of, descend, learning_rate

DISTILLED = "distilled"
# As tiny-moshi was trained (config/train-tiny-moshi.yaml); weights of codebooks beyond these are those of the last.
DROP = {"tokens": 0.15, "frames": 0.2, "depformer": 0.15}
CODEBOOK_WEIGHTS = (1, 1, 1, 0.8, 0.8, 0.6)
COPY_ROWS = 1
VOICE_PROMPTS = 0.9
WEIGHT_DECAY = 0.01


class TrainingCfg(TypedDict):
    """`lm_recipe.training`. steps, learning_rate: of all their pairs one is chosen on val."""

    data: list[str]
    prompts: int
    steps: list[int]
    batch: int
    learning_rate: list[float]


class Pace(NamedTuple):
    """How long and how fast a network is trained: steps, peak learning rate."""

    steps: int
    learning_rate: float


class PackingCfg(TypedDict):
    """Of `lm_recipe`, how weights are packed."""

    group: int | None
    symmetric: bool
    rounding: str


def told(count: int, part: str, voices: Sequence[str], frames: int, seed: int) -> list[Clip]:
    """Sentences of a part of the grammar, each in one of the voices in turn, as clips of so many silent frames."""
    rng, found = random.Random(f"{seed}-{part}"), dict[str, None]()
    while len(found) < count:
        text = grammar.sentence(rng)
        if grammar.part_of(text) == part:
            found[text] = None
    silence = np.zeros((1, 1, frames), dtype=np.int16)
    return [Clip(voices[i % len(voices)], text, (), silence) for i, text in enumerate(found)]


def by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Heads as interventions take them."""
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


class Nets:
    """A model's networks by condition, each made once.

    `pace`: how they are trained from now on, at first the first of `paces`. clips: of part train; frames: how long
    answers are at most. Weights that were trained are kept as pieces.
    """

    def __init__(
        self,
        model: Moshi,
        cfg: SpokenCfg,
        training: TrainingCfg,
        packing: PackingCfg,
        clips: list[Clip],
        frames: int,
        seed: int,
        pieces: Pieces,
    ) -> None:
        self.model, self.cfg, self.training, self.packing, self.seed = model, cfg, training, packing, seed
        self.clips, self.frames, self.pieces = clips, frames, pieces
        self.whole = model.net
        self.paces = [Pace(*pair) for pair in product(sorted(training["steps"]), sorted(training["learning_rate"]))]
        self.pace = self.paces[0]
        self._made: dict[tuple[Any, ...], MoshiNet] = {}
        self._seconds: dict[str, float] = {}
        self._rows: list[tuple[Tensor, int]] | None = None
        if any(len(kept) < model.config.heads for kept in model.net.heads):
            raise EqknobsError(f"models.{model.name}: heads were removed from it already; take the whole model")

    # What is learnt

    def asked(self) -> list[Asked]:
        """Sentences of part train that the intact model is told to say."""
        voices = sorted({clip.voice for clip in self.clips})
        rows = told(self.training["prompts"], "train", voices, self.frames, self.seed)
        return Sentences(self.model, rows, self.clips).asked()

    def distilled(self) -> list[tuple[Tensor, int]]:
        """The intact model's answers to those, as sequences to train on: [streams, P + T] and P."""
        if self._rows is None:
            asked, config = self.asked(), self.model.config
            made_of = ["teacher", digest(asked), self.cfg["temperature"]]

            def make() -> list[Answer]:
                with self.put(INTACT):
                    return speak(self.model, asked, sampling(self.cfg, 0), self.cfg["batch"])

            self._rows = []
            for row, answer in zip(asked, kept_answers(self.pieces, made_of, make), strict=True):
                assert row.prompt.frames is not None
                said = torch.empty(config.streams, len(answer.text), dtype=torch.long)
                said[0], said[config.agent], said[config.user] = answer.text, answer.codes, row.user
                self._rows.append((torch.cat([row.prompt.frames, said], 1), row.prompt.frames.shape[1]))
        return self._rows

    def batch(self, step: int, data: str, cfg: SpeechLMTrainingCfg, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The batch of a step: codes [B, streams, T], dialogue [B, T]."""
        if data != DISTILLED:
            return batch_of(step, cfg, sequences)
        rows, size = self.distilled(), cfg["batch"]
        epoch, place = divmod(step, max(1, len(rows) // size))
        order = random.Random(f"{self.seed}-distilled-{epoch}").sample(range(len(rows)), len(rows))
        return collate([rows[i] for i in order[place * size : (place + 1) * size]])

    def training_cfg(self) -> SpeechLMTrainingCfg:
        """As `speech_lm_training` takes it: one phase, on speech."""
        own, count = self.training, self.model.config.codebooks
        weights = [*CODEBOOK_WEIGHTS, *[CODEBOOK_WEIGHTS[-1]] * count][:count]
        found: dict[str, Any] = {
            "seed": self.seed,
            "batch": own["batch"],
            "steps": self.pace.steps,
            "learning_rate": self.pace.learning_rate,
        }
        found |= {"warmup": max(1, self.pace.steps // 10), "decay": 0.5, "copy_steps": 0, "copy_rows": COPY_ROWS}
        found |= {"voice_prompts": VOICE_PROMPTS, "drop": DROP, "codebook_weights": weights}
        return cast(SpeechLMTrainingCfg, found)

    def decided_by(self, condition: Condition) -> list[Any]:
        """What decides a condition's network, but for its widths, in plain JSON."""
        made: list[Any] = [[list(head) for head in condition.heads], condition.codebooks, condition.trained]
        if condition.trained == NONE:
            return made
        seen = hashlib.sha256()
        for clip in self.clips:
            seen.update(f"{clip.voice} {clip.text} {clip.frames}".encode() + clip.codes.tobytes())
        taught = [digest(self.asked()), self.cfg["temperature"]] if condition.trained == DISTILLED else []
        return [*made, dict(self.training_cfg()), seen.hexdigest(), taught]

    def tune(self, net: MoshiNet, data: str, codebooks: int) -> list[float]:
        """Train a network, in place; returns the losses. codebooks: of the agent's, those that it gets and learns in
        the dialogue (0: all), as it will be without the others."""
        cfg, agent = self.training_cfg(), net.config.agent
        sequences = Sequences(self.clips, self.model.tokeniser(), net.config)
        for weight in net.parameters():
            weight.data = weight.data.clone()  # not the file's own pages
        net.requires_grad_(True).train()
        optimizer, found = adam(net, WEIGHT_DECAY), []
        with torch.enable_grad():
            for step in range(cfg["steps"]):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(cfg, step)
                codes, dialogue = self.batch(step, data, cfg, sequences)
                if codebooks:
                    gone = codes[:, agent.start + codebooks : agent.stop]
                    gone.masked_fill_(dialogue[:, None], -1)
                found.append(descend(net, optimizer, step, cfg, codes, dialogue))
        net.eval().requires_grad_(False)
        return found

    # Networks

    def of(self, condition: Condition) -> MoshiNet:
        """The network of a condition, not packed."""
        if not condition.heads and condition.trained == NONE and not condition.codebooks:
            return self.whole
        key = (condition.heads, condition.trained, condition.codebooks, self.pace)
        if key not in self._made:
            net = load_net(self.model.files)
            remove_heads(net, by_layer(condition.heads))
            if condition.trained != NONE:
                self._trained(net, condition)
            if condition.codebooks:
                remove_codebooks(net, condition.codebooks)
            self._made[key] = net.to(self.model.device, self.whole.dtype)
        return self._made[key]

    def _trained(self, net: MoshiNet, condition: Condition) -> None:
        """Give a network the weights that training leaves."""

        def make() -> dict[str, np.ndarray]:
            learnt = self.tune(net, condition.trained, condition.codebooks)
            print(f"{condition.name}: loss {learnt[0]:.3f} to {np.mean(learnt[-10:]):.3f}", flush=True)
            return {name: value.half().numpy() for name, value in net.state_dict().items()}

        found = self.pieces.arrays("lm-recovered", self.decided_by(condition), make)
        net.load_state_dict({name: torch.from_numpy(value).float() for name, value in found.items()})

    def plan(self, condition: Condition) -> Plan | None:
        """How a condition is packed: all that can be, at one width."""
        if not condition.bits:
            return None
        return Plan.uniform(packable(self.of(condition)), condition.bits, **self.packing)

    @contextmanager
    def put(self, condition: Condition) -> Iterator[None]:
        """While the block runs, the model is that of the condition; what is packed has the values of its file."""
        net, plan = self.of(condition), self.plan(condition)
        self.model.net = net
        try:
            if plan is None:
                yield
            else:
                with faked(net, plan):
                    yield
        finally:
            self.model.net = self.whole

    def sizes(self, condition: Condition) -> dict[str, float]:
        """`codebooks` that it says; `bits_mean` of what is packed; `bytes` of tensor data in its file; `bytes_resident`
        that its network holds, float32 what is not packed."""
        net, plan = self.of(condition), self.plan(condition)
        state = net.state_dict()
        packed = {} if plan is None else {name: value for name, value in state.items() if name in plan.bits}
        held = sum(value.numel() * value.element_size() for name, value in state.items() if name not in packed)
        return {
            "codebooks": net.steps,
            "bits_mean": np.nan if plan is None else mean_bits(state, plan),
            "bytes": plan_bytes(state, plan or Plan({})),
            "bytes_resident": held + (0 if plan is None else plan_bytes(packed, plan)),
        }

    def step_ratio(self, condition: Condition, asked: Asked) -> float:
        """Time of a frame beside the intact model's; packed linears and embeddings unpack at every call."""
        for one in (INTACT, condition):
            if one.name not in self._seconds:
                plan = self.plan(one)
                net = self.of(one) if plan is None else copy.deepcopy(self.of(one))
                if plan is not None:
                    pack_modules(net, plan)
                self.model.net = net
                try:
                    self._seconds[one.name] = frame_seconds(self.model, asked)
                finally:
                    self.model.net = self.whole
        return self._seconds[condition.name] / self._seconds[INTACT.name]
