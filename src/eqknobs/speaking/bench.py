"""A speech LM, what it is asked, and what is known of its answers under a condition.

What is dear is kept in pieces (nats and answers of a condition, a file each; what the judges heard), so that a job that
was ended goes on where it was. Answers are paired: prompt i and draw d have one seed under all conditions.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, NotRequired, Protocol, TypedDict, TypeVar

import numpy as np
import torch

from eqknobs.errors import EqknobsError, counted
from eqknobs.io import read_csv
from eqknobs.models import ModelCfg
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.generate import Sampling
from eqknobs.models.moshi.likelihood import Said, losses, nats
from eqknobs.pieces import Pieces
from eqknobs.provenance import content, module_inputs
from eqknobs.sound.judges import similarity
from eqknobs.sound.renders import pick_clips
from eqknobs.speaking.answers import Answer, as_said, costs, divergence, speak, text_costs
from eqknobs.speaking.clips import encode_speech, read_clips
from eqknobs.speaking.prompts import Asked, Sentences, Talk, conversations
from eqknobs.speaking.scores import Judge, JudgeCfg
from eqknobs.speaking.takes import Take

SEEDS_APART = 100_000  # between draws: answer i of a draw has seed draw * SEEDS_APART + i


class PromptsCfg(TypedDict):
    """Of a stage that lets a model speak, `prompts`."""

    source: str
    sentences: str | None
    seconds: NotRequired[float]
    text: NotRequired[str | None]
    voice: NotRequired[str | None]
    count: int
    held_out: int
    calibration: int


class SpokenCfg(TypedDict):
    """What such a stage reads: its prompts, how it answers, the model and the judges."""

    model: ModelCfg
    prompts: PromptsCfg
    batch: int
    temperature: float
    dnsmos: bool
    judges: JudgeCfg


class Condition(Protocol):
    """What is done to a model."""

    @property
    def name(self) -> str: ...

    def row(self) -> dict[str, Any]:
        """Its columns in tables."""
        ...


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


def speech_of(model: Moshi, judge: Judge, cfg: SpokenCfg, manifest: str | None, codes: Path, pieces: Pieces) -> Speech:
    """Prompts, and speech to be teacher-forced; see `prompts` of a stage.

    manifest: of the run's speech, where that is the source; codes: where those of sentences are kept; pieces: the
    store, for this model and this code.
    """
    asks = cfg["prompts"]
    if asks["source"] == "sentences":
        if asks["sentences"] is None:
            raise EqknobsError("config: prompts.sentences: name a folder, or take source: speech")
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
        raise EqknobsError("config: prompts: source speech needs the run's manifest")
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


def sampling(cfg: SpokenCfg, draw: int) -> Sampling:
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


C = TypeVar("C", bound=Condition)


def matching(conditions: Sequence[C], patterns: Sequence[str], key: str) -> list[C]:
    """The conditions whose name any pattern matches. Raises EqknobsError, naming the key of the configuration, for one
    that matches none."""
    names = [condition.name for condition in conditions]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise EqknobsError(f"config: {key}: no condition is called {pattern!r}; names are like {names[0]}")
    return [c for c in conditions if any(fnmatchcase(c.name, pattern) for pattern in patterns)]


class Bench(ABC, Generic[C]):
    """A model, what it is asked, and what is known of its answers.

    pieces: the store, for this model and this code; whole: the condition in which nothing is done to the model.
    `intact`: its answers by draw, with which others are compared; `hear_intact` makes them.
    """

    cfg: SpokenCfg

    def __init__(self, model: Moshi, judge: Judge, speech: Speech, cfg: SpokenCfg, pieces: Pieces, whole: C) -> None:
        self.model, self.judge, self.speech, self.pieces, self.whole = model, judge, speech, pieces, whole
        self.cfg = cfg
        self.intact: dict[int, list[Answer]] = {}
        self._voices: dict[int, list[np.ndarray]] = {}

    @abstractmethod
    def applied(self, condition: C) -> AbstractContextManager[None]:
        """While the block runs, that is done to the model."""

    @abstractmethod
    def decided_by(self, condition: C) -> Any:
        """What decides what a condition does, in plain JSON."""

    def hear_intact(self, draws: int) -> list[dict[str, Any]]:
        """The intact model's answers of so many draws, two at least, and their records."""
        self.intact = {draw: self.answers(self.whole, draw) for draw in range(max(2, draws))}
        return [row for draw in self.intact for row in self.score(self.whole, draw)]

    def batches(self, said: Sequence[Said]) -> list[Sequence[Said]]:
        """Rows, as many at once as the configuration says."""
        size = self.cfg["batch"]
        return [said[i : i + size] for i in range(0, len(said), size)]

    def loss(self) -> float:
        """Nats a frame of the calibration clips, under the model as it is now."""
        with inference():
            return float(
                torch.cat([losses(nats(self.model.net, b)) for b in self.batches(self.speech["calibration"])]).mean()
            )

    def screen(self, condition: C) -> list[dict[str, Any]]:
        """One record a held-out clip: nats a frame of its text and codes."""

        def make() -> list[list[float]]:
            with self.applied(condition):
                return [list(row) for row in costs(self.model, self.speech["held_out"], self.cfg["batch"])]

        made_of = [self.decided_by(condition), digest(self.speech["held_out"])]
        found = self.pieces.json("lm-nats", made_of, make)
        rows = zip(self.speech["held_by"], found, strict=False)
        return [
            {**condition.row(), "id": f"{i:03d}", "speaker": speaker, "nll_text": text, "nll_audio": audio}
            for i, (speaker, (text, audio)) in enumerate(rows)
        ]

    def answers(self, condition: C, draw: int) -> list[Answer]:
        """What the model says under a condition, one answer a prompt."""

        def make() -> list[Answer]:
            with self.applied(condition):
                return speak(self.model, self.speech["asked"], sampling(self.cfg, draw), self.cfg["batch"])

        made_of = [self.decided_by(condition), digest(self.speech["asked"]), draw, self.cfg["temperature"]]
        return kept_answers(self.pieces, made_of, make)

    def takes(self, condition: C, columns: dict[str, Any], count: int) -> list[Take]:
        """The first answers of draw 0, to be heard."""
        rows = zip(self.speech["asked"][:count], self.answers(condition, 0), strict=False)
        return [Take(condition.name, columns, row, answer, self.judge.sound(answer)) for row, answer in rows]

    def score(self, condition: C, draw: int, rated: bool = True) -> list[dict[str, Any]]:
        """One record an answer; rated: by DNSMOS too, if the config wants that.

        `similarity_intact` and `divergence` are to the intact model's answer of the same draw; of the intact model's
        own, to its answer of the next draw: that is their null.
        """
        other = draw if condition != self.whole else (draw + 1) % len(self.intact)
        rated = rated and self.cfg["dnsmos"]
        judges = [self.judge.transcriber.identity, self.judge.encoder.identity, rated]
        made_of = [
            self.decided_by(condition),
            digest(self.speech["asked"]),
            draw,
            other,
            self.cfg["temperature"],
            judges,
        ]
        found = self.pieces.json("lm-scores", made_of, lambda: self._score(condition, draw, other, rated))
        print(f"{condition.name}, draw {draw}: {counted(len(found), 'answer')}", flush=True)
        rows = zip(self.speech["asked"], found, strict=True)
        return [
            {**condition.row(), "draw": draw, "id": asked.id, "speaker": asked.speaker, **row} for asked, row in rows
        ]

    def _intact_voices(self, draw: int) -> list[np.ndarray]:
        """The voices of the intact answers."""
        if draw not in self._voices:
            self._voices[draw] = [self.judge.embed(answer) for answer in self.intact[draw]]
        return self._voices[draw]

    def _score(self, condition: C, draw: int, other: int, rated: bool) -> list[dict[str, Any]]:
        asked, answers, records = self.speech["asked"], self.answers(condition, draw), []
        found = text_costs(self.model, as_said(asked, answers), self.cfg["batch"])  # under the intact model
        twins = zip(self.intact[other], self._intact_voices(other), strict=True)
        for row, answer, (twin, voice), text in zip(asked, answers, twins, found, strict=True):
            wav = self.judge.sound(answer)
            record, now = self.judge.record(row, answer, wav, rated), self.judge.voice(wav)
            record |= {"nll_intact": text, "divergence": divergence(answer, twin)}
            records.append(record | {"similarity_intact": similarity(now, voice)})
        return records


def opened(
    cfg: SpokenCfg, manifest: str | None, codes: Path, pieces: Pieces, module: str
) -> tuple[Moshi, Judge, Speech, Pieces]:
    """The model, its judge, its speech, and the store for it and for the code of a stage's module.

    Raises EqknobsError as these do.
    """
    model = Moshi(cfg["model"])
    judge = Judge(model, {**cfg["judges"], "dnsmos": cfg["dnsmos"]}, pieces)
    made_of = [model.revision, {k: v for k, v in cfg["model"].items() if k != "device"}]
    own = pieces.within([*made_of, [content(file) for file in module_inputs(module)]])
    return model, judge, speech_of(model, judge, cfg, manifest, codes, own), own
