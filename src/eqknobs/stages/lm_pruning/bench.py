"""A speech LM, what it is asked, and what is known of its answers under a condition.

What is dear is kept in pieces (nats and answers of a condition, a file each; what the judges heard), so that a job that
was ended goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError, counted
from eqknobs.io import read_csv
from eqknobs.models import ModelCfg
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.generate import Sampling
from eqknobs.models.moshi.interventions import skipped_layers, zeroed_heads
from eqknobs.models.moshi.likelihood import Said, head_gradients, head_means, losses, nats
from eqknobs.pieces import Pieces
from eqknobs.sound.judges import similarity
from eqknobs.sound.renders import pick_clips
from eqknobs.speaking.answers import Answer, as_said, costs, divergence, speak
from eqknobs.speaking.clips import encode_speech, read_clips
from eqknobs.speaking.prompts import Asked, Sentences, Talk, conversations
from eqknobs.speaking.scores import Judge, JudgeCfg
from eqknobs.stages.lm_pruning import plan
from eqknobs.stages.lm_pruning.plan import INTACT, Condition, HeadsCfg, PartsCfg

SEEDS_APART = 100_000  # between draws: answer i of a draw has seed draw * SEEDS_APART + i
PLAYED = (
    ("intact", "intact"),
    ("acoustic_first", "acoustic first"),
    ("random", "random"),
)  # order -> what it is called


class PromptsCfg(TypedDict):
    """`lm_pruning.prompts`."""

    source: str
    sentences: str | None
    seconds: NotRequired[float]
    text: NotRequired[str | None]
    voice: NotRequired[str | None]
    count: int
    held_out: int
    calibration: int


class RemovalCfg(TypedDict):
    """`lm_pruning.removal`."""

    order: str
    shares: list[float]
    nf4: bool


class CodebooksCfg(TypedDict):
    """`lm_pruning.codebooks`."""

    readings: list[str]
    counts: list[int]
    count: int


class PruningCfg(TypedDict):
    """What `prune_and_score` reads: the section `lm_pruning`, the model, the judges and the device."""

    model: ModelCfg
    prompts: PromptsCfg
    property: str
    heads: HeadsCfg
    weights: PartsCfg | None
    layers: PartsCfg | None
    answered: list[str]
    confirmed: list[str]
    draws: int
    removal: RemovalCfg | None
    codebooks: CodebooksCfg | None
    batch: int
    temperature: float
    dnsmos: bool
    listen: int
    judges: JudgeCfg
    device: NotRequired[str]
    content: NotRequired[Any]  # digests, which decide when to score again, not how


class Speech(TypedDict):
    """What a model is scored on."""

    asked: list[Asked]
    held_out: list[Said]
    held_by: list[str]  # who speaks in those
    calibration: list[Said]
    real: list[tuple[str, str, Answer]]  # speaker, words and tokens of clips that nobody generated


def kept_answers(pieces: Pieces, made_of: Any, make: Callable[[], list[Answer]]) -> list[Answer]:
    """Answers as a piece."""

    def arrays() -> dict[str, np.ndarray]:
        made = make()
        text = np.stack([one.text.numpy() for one in made])
        return {"text": text, "codes": np.stack([one.codes.numpy() for one in made]).astype(np.int16)}

    found = pieces.arrays("lm-answers", made_of, arrays)
    rows = zip(torch.from_numpy(found["text"]), torch.from_numpy(found["codes"]).long(), strict=True)
    return [Answer(text, codes) for text, codes in rows]


def speech_of(model: Moshi, judge: Judge, cfg: PruningCfg, manifest: str | None, codes: Path, pieces: Pieces) -> Speech:
    """Prompts, and speech to be teacher-forced; see `lm_pruning.prompts`.

    manifest: of the run's speech, where that is the source; codes: where those of sentences are kept; pieces: the
    store, for this model and this code.
    """
    asks = cfg["prompts"]
    if asks["source"] == "sentences":
        if asks["sentences"] is None:
            raise EqknobsError("config: lm_pruning.prompts.sentences: name a folder, or take source: speech")
        encode_speech(asks["sentences"], codes, model.codec, model.config.codebooks, levels=1, seed=0)
        parts = read_clips(asks["sentences"], codes)
        told = Sentences(model, parts["test"][: asks["count"]], parts["train"])
        known = (parts["val"] or parts["train"])[: asks["calibration"]]
        clips, agent = parts["test"][: asks["held_out"]], model.config.agent
        frames = [told.sequences.spoken(clip) for clip in clips]
        return Speech(
            asked=told.asked(judge.voices(told.sequences)),
            held_out=told.said(clips),
            held_by=[clip.voice for clip in clips],
            calibration=told.said(known),
            real=[(c.voice, c.text, Answer(f[0], f[agent])) for c, f in zip(clips, frames, strict=True)],
        )
    if manifest is None:
        raise EqknobsError("lm_pruning.prompts: source speech needs the run's manifest")
    table = read_csv(manifest)
    talk = Talk(seconds=asks.get("seconds") or 12.0, text=asks.get("text"), voice=asks.get("voice"))
    asked = conversations(model, pick_clips(table, "test", asks["count"]), talk, judge.encoder)
    others = conversations(model, pick_clips(table, "val", asks["calibration"]), talk, judge.encoder)

    def own(rows: list[Asked]) -> list[Said]:
        """What nobody has put into tokens: the model's own answers are what it finds likely."""
        made_of = ["own", digest(rows), cfg["temperature"]]
        found = kept_answers(pieces, made_of, lambda: speak(model, rows, sampling(cfg, 0), cfg["batch"]))
        return as_said(rows, found)

    held_out, calibration = own(asked), own(others)
    words = dict(zip(table["id"].astype(str), table["text"], strict=True))
    return Speech(
        asked=asked,
        held_out=held_out[: asks["held_out"]],
        held_by=[row.speaker for row in asked],
        calibration=calibration,
        real=[(r.speaker, words[r.id], Answer(torch.full((r.user.shape[1],), -1), r.user)) for r in asked],
    )


def sampling(cfg: PruningCfg, draw: int) -> Sampling:
    """How a draw's tokens are drawn."""
    return Sampling(cfg["temperature"], text_temperature=cfg["temperature"], seed=SEEDS_APART * draw)


def digest(rows: Sequence[Asked] | Sequence[Said]) -> str:
    """Of what a model is given, token by token."""
    found = hashlib.sha256()
    for row in rows:
        voice = row.prompt.voice
        parts = [row.prompt.frames, row.user, None if voice is None else voice.embeddings]
        parts += [row.text, row.codes] if isinstance(row, Said) else []
        for part in parts:
            found.update(b"none" if part is None else part.float().numpy().tobytes())
    return found.hexdigest()


class Bench:
    """A model, what it is asked, and what is known of its answers. pieces: the store, for this model and this code."""

    def __init__(self, model: Moshi, judge: Judge, speech: Speech, cfg: PruningCfg, pieces: Pieces) -> None:
        self.model, self.judge, self.speech, self.cfg, self.pieces = model, judge, speech, cfg, pieces
        self.means: list[Tensor] = []
        self.intact: dict[int, list[Answer]] = {}

    def batches(self, said: Sequence[Said]) -> list[Sequence[Said]]:
        size = self.cfg["batch"]
        return [said[i : i + size] for i in range(0, len(said), size)]

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A piece that the calibration clips decide."""
        made_of = [name, digest(self.speech["calibration"])]
        return self.pieces.arrays("lm-calibration", made_of, lambda: {"found": make()})["found"]

    def calibrate(self) -> dict[str, Tensor]:
        """Values of heads by which they can be ordered: `norm`, `gradient`, `damage` [layers, heads]; of layers,
        `layers` [layers]. Sets `means`."""
        net, batches = self.model.net, self.batches(self.speech["calibration"])
        single = [[row] for row in self.speech["calibration"]]  # a gradient keeps what every layer holds
        self.means = [
            torch.from_numpy(m) for m in self.array("means", lambda: torch.stack(head_means(net, batches)).numpy())
        ]
        if any(len(kept) < net.config.heads for kept in net.heads):
            raise EqknobsError(f"models.{self.model.name}: heads were removed from it already; prune the whole model")
        found = {"norm": plan.norms(net)}
        found["gradient"] = torch.from_numpy(self.array("gradient", lambda: head_gradients(net, single).numpy()))
        found["damage"] = torch.from_numpy(self.array("damage", self._damage_of_heads))
        found["layers"] = torch.from_numpy(self.array("layers", self._damage_of_layers))
        return found

    def _loss(self) -> float:
        with inference():
            return float(
                torch.cat([losses(nats(self.model.net, b)) for b in self.batches(self.speech["calibration"])]).mean()
            )

    def _damage_of_heads(self) -> np.ndarray:
        net, intact = self.model.net, self._loss()
        found = np.empty((net.config.layers, net.config.heads))
        for layer in range(net.config.layers):
            for head in range(net.config.heads):
                with zeroed_heads(net, {layer: [head]}):
                    found[layer, head] = self._loss() - intact
        return found

    def _damage_of_layers(self) -> np.ndarray:
        intact, found = self._loss(), []
        for layer in range(self.model.config.layers):
            with skipped_layers(self.model.net, [layer]):
                found.append(self._loss() - intact)
        return np.array(found)

    def screen(self, condition: Condition) -> list[dict[str, Any]]:
        """One record a held-out clip: nats a frame of its text and codes."""

        def make() -> list[list[float]]:
            with condition.applied(self.model.net, self.means):
                return [list(row) for row in costs(self.model, self.speech["held_out"], self.cfg["batch"])]

        made_of = [self._made_of(condition), digest(self.speech["held_out"])]
        found = self.pieces.json("lm-nats", made_of, make)
        rows = zip(self.speech["held_by"], found, strict=False)
        return [
            {**condition.row(), "id": f"{i:03d}", "speaker": speaker, "nll_text": text, "nll_audio": audio}
            for i, (speaker, (text, audio)) in enumerate(rows)
        ]

    def _made_of(self, condition: Condition) -> Any:
        """What decides what a condition does."""
        means = [float(m.double().sum()) for m in self.means] if condition.repair == "mean" else None
        return json.loads(json.dumps([condition.repair, condition.heads, condition.weights, condition.layers, means]))

    def answers(self, condition: Condition, draw: int) -> list[Answer]:
        """What the model says under a condition, one answer a prompt."""

        def make() -> list[Answer]:
            with condition.applied(self.model.net, self.means):
                return speak(self.model, self.speech["asked"], sampling(self.cfg, draw), self.cfg["batch"])

        made_of = [self._made_of(condition), digest(self.speech["asked"]), draw, self.cfg["temperature"]]
        return kept_answers(self.pieces, made_of, make)

    def score(self, condition: Condition, draw: int, rated: bool = True) -> list[dict[str, Any]]:
        """One record an answer; rated: by DNSMOS too, if the config wants that.

        `similarity_intact` and `divergence` are to the intact model's answer of the same draw; of the intact model's
        own, to its answer of the next draw: that is their null.
        """
        other = draw if condition != INTACT else (draw + 1) % len(self.intact)
        rated = rated and self.cfg["dnsmos"]
        judges = [self.judge.transcriber.identity, self.judge.encoder.identity, rated]
        made_of = [self._made_of(condition), digest(self.speech["asked"]), draw, other, self.cfg["temperature"], judges]
        found = self.pieces.json("lm-scores", made_of, lambda: self._score(condition, draw, self.intact[other], rated))
        print(f"{condition.name}, draw {draw}: {counted(len(found), 'answer')}", flush=True)
        rows = zip(self.speech["asked"], found, strict=True)
        return [
            {**condition.row(), "draw": draw, "id": asked.id, "speaker": asked.speaker, **row} for asked, row in rows
        ]

    def _score(self, condition: Condition, draw: int, against: Sequence[Answer], rated: bool) -> list[dict[str, Any]]:
        answers, records = self.answers(condition, draw), []
        found = costs(self.model, as_said(self.speech["asked"], answers), self.cfg["batch"])  # under the intact model
        for asked, answer, twin, (text, _) in zip(self.speech["asked"], answers, against, found, strict=True):
            record = self.judge.record(asked, answer, rated=rated)
            alike = similarity(self.judge.embed(answer), self.judge.embed(twin))
            records.append(
                record | {"nll_intact": text, "divergence": divergence(answer, twin), "similarity_intact": alike}
            )
        return records
