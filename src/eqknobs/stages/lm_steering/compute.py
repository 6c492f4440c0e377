"""A speech LM that is steered while it speaks: a step along a direction is added to a residual layer.

The step goes to the column that is read last, which is every frame that is generated and the last one of the prompt,
from which the first is made; the prompt itself stays as it was. On prompts of val every direction gets the α at which
it shifts the property as far as asked, and the layer is chosen; on other prompts of test it speaks with both. Beside
it: random directions of the same length, and what does the same without steering (`PLAIN`).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import librosa
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.errors import EqknobsError, counted
from eqknobs.io import array_hash, read_csv, write_csv
from eqknobs.models import ModelCfg
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.generate import Sampling
from eqknobs.pieces import Pieces
from eqknobs.provenance import content, module_inputs
from eqknobs.sound.judges import RATE, similarity
from eqknobs.sound.metrics import clip_f0, loudness_db
from eqknobs.sound.renders import pick_clips
from eqknobs.speaking.answers import Answer, divergence, speak
from eqknobs.speaking.bench import SEEDS_APART, digest, kept_answers
from eqknobs.speaking.clips import Sequences, encode_speech, read_clips
from eqknobs.speaking.grammar import drawn
from eqknobs.speaking.prompts import Asked, Sentences, Talk, conversations
from eqknobs.speaking.scores import Judge, JudgeCfg
from eqknobs.speaking.takes import Take, write_takes
from eqknobs.stages.lm_layers.turns import read_index
from eqknobs.stages.lm_steering.directions import VOICE, DirectionsCfg, Files, find, two_voices

PLAIN = {"rms": "gain", "pitch": "vocoder", "voice": "prompt"}  # property -> what shifts it without steering
CLIPS = 8  # of a voice, from which its mean embedding is made


class PromptsCfg(TypedDict):
    """`lm_steering.prompts`."""

    source: str
    sentences: str | None
    seconds: NotRequired[float]
    text: NotRequired[str | None]
    voice: NotRequired[str | None]
    val: int
    test: int


class RandomCfg(TypedDict):
    """`lm_steering.random`."""

    seeds: int
    beside: list[str]


class SteeringCfg(DirectionsCfg):
    """What `steer_and_score` reads: the section `lm_steering`, how `lm_layers` fits probes, the model, the judges."""

    model: ModelCfg
    prompts: PromptsCfg
    layers: list[int]
    shifts: dict[str, float]  # property -> semitones, dB or similarity
    alphas: list[float]
    rounds: int
    tolerance: float
    multiples: list[float]
    random: RandomCfg
    periodicity: float
    draws: int
    batch: int
    temperature: float
    listen: int
    judges: JudgeCfg
    device: NotRequired[str]
    content: NotRequired[Any]  # digests, which decide when to score again, not how


class Inputs(TypedDict):
    """Files that it reads: turns, index and labels of `lm_layers`, the folder of its SAEs (None: no direction is of
    one); the manifest of the run's speech, where people talk to the model; where codes of sentences go."""

    turns: str
    index: str
    labels: str
    saes: Path | None
    manifest: str | None
    codes: Path


class Outputs(TypedDict):
    """Files that it writes; `sounds` is a folder."""

    calibration: str
    answers: str
    sounds: str


@dataclass(frozen=True)
class Condition:
    """One way to speak. step: float32 [width], of α = 1; None where nothing is steered.

    matched: reached or unreached (α of val), multiple (of it), same_length (random, as long as the direction `beside`),
    plain, tried (on val), intact. shift: what is asked for, in the property's unit.
    """

    what: str = "none"  # the property
    direction: str = "intact"
    seed: int = 0
    layer: int = -1
    alpha: float = 0.0
    matched: str = "intact"
    beside: str = "none"
    shift: float = 0.0
    step: np.ndarray | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Unlike that of any other condition."""
        if self.direction == "intact":
            return "intact"
        return f"{self.what}:{self.direction}:{self.seed}:{self.beside}:{self.layer}:{self.alpha:g}"

    def row(self) -> dict[str, Any]:
        """Its columns."""
        keys = ("direction", "seed", "matched", "beside", "alpha")
        row = {"layer": self.layer, "property": self.what} | {key: getattr(self, key) for key in keys}
        row["wanted"] = self.shift
        return row if self.step is not None else row | {"layer": np.nan, "alpha": np.nan}


INTACT = Condition()


class SteerBench:
    """A model, prompts of one split, and what is known of its answers. pieces: for this model and this code.

    voices: (name, embedding [256]) of the two between which the voice is steered, from the first to the second; of
    someone who has the second, back.
    """

    def __init__(
        self,
        model: Moshi,
        judge: Judge,
        asked: list[Asked],
        turned: list[Asked] | None,
        voices: Sequence[tuple[str, np.ndarray]],
        cfg: SteeringCfg,
        pieces: Pieces,
    ) -> None:
        self.model, self.judge, self.asked, self.turned = model, judge, asked, turned
        self.voices, self.cfg, self.pieces = voices, cfg, pieces
        self.intact: dict[int, list[Answer]] = {}
        self._voices: dict[int, list[np.ndarray]] = {}
        self.signs = [-1.0 if voices and row.speaker == voices[1][0] else 1.0 for row in asked]

    # --- what is said

    def prompts(self, condition: Condition) -> list[Asked]:
        """The prompts, or the same sentences in the other voice."""
        other = condition.matched == "plain" and condition.what == VOICE
        return self.turned if other and self.turned else self.asked

    def answers(self, condition: Condition, draw: int = 0) -> list[Answer]:
        """What is said under a condition, one answer a prompt; answer i of a draw has one seed under all conditions."""
        asked, cfg = self.prompts(condition), self.cfg
        signs = self.signs if condition.what == VOICE else [1.0] * len(asked)

        def make() -> list[Answer]:
            found: list[Answer] = []
            for first in range(0, len(asked), cfg["batch"]):
                part = slice(first, first + cfg["batch"])
                seed = SEEDS_APART * draw + first
                sampling = Sampling(cfg["temperature"], text_temperature=cfg["temperature"], seed=seed)
                with self._steered(condition, signs[part]):
                    found += speak(self.model, asked[part], sampling, cfg["batch"])
            return found

        return kept_answers(self.pieces, [*self._said_by(condition), draw], make)

    def _said_by(self, condition: Condition) -> list[Any]:
        """What decides what is said, in plain JSON."""
        made_of: list[Any] = [digest(self.prompts(condition)), self.cfg["temperature"]]
        if condition.step is not None:
            steps = hashlib.sha256((condition.alpha * condition.step).tobytes()).hexdigest()
            made_of += [condition.layer, steps, self.signs if condition.what == VOICE else None]
        return made_of

    def _heard_by(self, condition: Condition) -> list[Any]:
        """And what is heard of it."""
        voices = [[name, array_hash(embedding)] for name, embedding in self.voices]
        changed = [condition.what, condition.shift] if condition.matched == "plain" else None
        return [*self._said_by(condition), changed, voices, self.judge.encoder.identity, self.cfg["periodicity"]]

    def _steered(self, condition: Condition, signs: Sequence[float]) -> AbstractContextManager[None]:
        """While the block runs, rows of a batch are steered, each with its sign."""
        if condition.step is None:
            return nullcontext()
        push = torch.tensor(signs, dtype=torch.float32)[:, None] * torch.from_numpy(condition.alpha * condition.step)
        return self.model.editing(f"residual.{condition.layer}", pushed(push))

    def sound(self, condition: Condition, answer: Answer) -> np.ndarray:
        """Waveform [samples] of an answer, at the model's rate."""
        wav = self.judge.sound(answer)
        if condition.matched == "plain" and condition.what == "rms":
            return wav * np.float32(10 ** (condition.shift / 20))
        if condition.matched == "plain" and condition.what == "pitch":
            return librosa.effects.pitch_shift(wav, sr=self.model.sample_rate, n_steps=condition.shift)
        return wav

    # --- what is heard

    def measured(self, condition: Condition, draw: int = 0) -> list[float]:
        """Pitch (Hz), level (dB) or voice (similarity to the other less that to the own) of every answer."""
        name = condition.what

        def make() -> list[float | None]:
            return _plain(
                self._measure(name, asked, self.sound(condition, answer))
                for asked, answer in zip(self.asked, self.answers(condition, draw), strict=True)
            )

        found = self.pieces.json("lm-steered", [*self._heard_by(condition), name, draw], make)
        return [np.nan if value is None else value for value in found]

    def _measure(self, name: str, asked: Asked, wav: np.ndarray) -> float:
        wav = self.judge.at_judges_rate(wav)
        if name == "pitch":
            return clip_f0(wav, RATE, self.cfg["periodicity"])
        if name == "rms":
            return loudness_db(wav, RATE)
        to, own = self._similarities(asked, self.judge.encoder.embed(wav))
        return to - own

    def _similarities(self, asked: Asked, embedding: np.ndarray) -> tuple[float, float]:
        """Similarity to the voice that is steered to, and to the one that it is steered from."""
        if not self.voices:
            return np.nan, np.nan
        found = [similarity(embedding, voice) for _, voice in self.voices]
        return (found[0], found[1]) if asked.speaker == self.voices[1][0] else (found[1], found[0])

    def score(self, condition: Condition, draw: int = 0) -> list[dict[str, Any]]:
        """One record an answer. `similarity_intact` and `divergence` are to the intact answer of the same draw; of the
        intact model's own, to its answer of the next draw: their null."""
        other = draw if condition != INTACT else (draw + 1) % len(self.intact)
        made_of = [*self._heard_by(condition), draw, other, self.judge.transcriber.identity]
        found = self.pieces.json("lm-scores", made_of, lambda: self._score(condition, draw, other))
        print(f"{condition.name}, draw {draw}: {counted(len(found), 'answer')}", flush=True)
        return [
            {**condition.row(), "draw": draw, "id": row.id, "speaker": row.speaker, **record}
            for row, record in zip(self.asked, found, strict=True)
        ]

    def _embeddings(self, draw: int) -> list[np.ndarray]:
        """The voices of the intact answers."""
        if draw not in self._voices:
            self._voices[draw] = [self.judge.embed(answer) for answer in self.intact[draw]]
        return self._voices[draw]

    def _score(self, condition: Condition, draw: int, other: int) -> list[dict[str, Any]]:
        records, twins = [], zip(self.intact[other], self._embeddings(other), strict=True)
        for asked, answer, (twin, voice) in zip(self.asked, self.answers(condition, draw), twins, strict=True):
            wav = self.sound(condition, answer)
            record = self.judge.record(asked, answer, wav)
            heard = self.judge.at_judges_rate(wav)
            embedding = self.judge.encoder.embed(heard)
            to, own = self._similarities(asked, embedding)
            record |= {
                "f0": clip_f0(heard, RATE, self.cfg["periodicity"]),
                "level_db": loudness_db(heard, RATE),
                "similarity_to": to,
                "similarity_from": own,
                "similarity_intact": similarity(embedding, voice),
                "divergence": divergence(answer, twin),
            }
            records.append(record)
        return records


def _plain(values: Iterator[float]) -> list[float | None]:
    """As JSON has them."""
    return [float(value) if np.isfinite(value) else None for value in values]


def pushed(steps: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that adds steps [batch, width] to the last column of what a layer gives [batch, columns, width]."""

    def edit(acts: Tensor) -> Tensor:
        acts = acts.clone()
        acts[:, -1] += steps.to(acts)
        return acts

    return edit


def shifts_of(name: str, values: Sequence[float], intact: Sequence[float]) -> np.ndarray:
    """How far a property is shifted, answer by answer: semitones, dB or similarity."""
    now, before = np.asarray(values, float), np.asarray(intact, float)
    return 12 * np.log2(now / before) if name == "pitch" else now - before


# --- α on val


@dataclass(frozen=True)
class Found:
    """The α of a direction in a layer, the share of the wanted shift that val shows there, and whether that is it."""

    alpha: float
    share: float
    reached: bool


def next_alpha(tried: dict[float, float]) -> float | None:
    """Where a line through the first two neighbours of which one falls short of the shift and the next does not meets
    it; None where none passes it.

    tried: α -> share of the wanted shift, NaN where nothing could be measured (which counts as passed).
    """
    places = sorted({0.0: 0.0, **tried}.items())
    for (a, short), (b, past) in pairwise(places):
        if short < 1 and not past < 1:
            share = 0.5 if np.isnan(past) else (1 - short) / (past - short)
            return a + (b - a) * min(max(share, 0.05), 0.95)
    return None


def closest(tried: dict[float, float], tolerance: float) -> Found:
    """The α whose shift is nearest to the wanted one, of equals the smallest."""
    known = {alpha: share for alpha, share in tried.items() if np.isfinite(share)}
    if not known:
        return Found(min(tried), np.nan, False)
    alpha = min(known, key=lambda a: (abs(known[a] - 1), a))
    return Found(alpha, known[alpha], abs(known[alpha] - 1) <= tolerance)


def solve(measure: Callable[[float], float], alphas: Sequence[float], rounds: int, tolerance: float) -> Found:
    """Try the alphas until one passes the shift, then up to `rounds` between; measure: α -> share of the shift."""
    tried: dict[float, float] = {}
    for alpha in sorted(alphas):
        tried[alpha] = measure(alpha)
        if not tried[alpha] < 1:
            break
    for _ in range(rounds):
        following = next_alpha(tried)
        if following is None or following in tried or closest(tried, tolerance).reached:
            break
        tried[following] = measure(following)
    return closest(tried, tolerance)


class Calibration:
    """Finds α and the layer on val, and keeps all that was tried: `rows`, one a prompt."""

    def __init__(self, bench: SteerBench, cfg: SteeringCfg) -> None:
        self.bench, self.cfg = bench, cfg
        self.rows: list[dict[str, Any]] = []

    def solve(self, layer: int, name: str, direction: str, step: np.ndarray) -> Found:
        """The α of one direction."""
        wanted, bench = self.cfg["shifts"][name], self.bench
        intact = bench.measured(replace(INTACT, what=name))
        signed = step if wanted > 0 else -step

        def condition(alpha: float) -> Condition:
            return Condition(name, direction, 0, layer, alpha, "tried", shift=wanted, step=signed)

        def share(alpha: float) -> float:
            """Of the shift; NaN where fewer than half of the answers could be measured."""
            values = bench.measured(condition(alpha))
            shifts = shifts_of(name, values, intact)
            for asked, value, before, shift in zip(bench.asked, values, intact, shifts, strict=True):
                row = {**condition(alpha).row(), "id": asked.id, "speaker": asked.speaker}
                self.rows.append(row | {"value": value, "intact": before, "shift": shift})
            known = np.isfinite(shifts)
            return float(shifts[known].mean() / wanted) if 2 * known.sum() >= max(1, len(shifts)) else np.nan

        found = solve(share, self.cfg["alphas"], self.cfg["rounds"], self.cfg["tolerance"])
        errors = self._errors(condition(found.alpha)) if len(self.cfg["layers"]) > 1 else {}
        for row in self.rows:
            at = (row["layer"], row["property"], row["direction"], row["alpha"])
            if at == (layer, name, direction, found.alpha):
                row |= {"matched": "reached" if found.reached else "unreached", **errors.get(row["id"], {})}
        return found

    def _errors(self, condition: Condition) -> dict[str, dict[str, float]]:
        """Word errors of every answer, by which layers are chosen."""
        bench = self.bench
        bench.intact = bench.intact or {draw: bench.answers(INTACT, draw) for draw in range(2)}
        keys = ("errors_monologue", "words_monologue", "errors_prompt", "words_prompt")
        return {row["id"]: {key: row[key] for key in keys} for row in bench.score(condition)}

    def chosen(self, name: str, found: dict[tuple[int, str], Found]) -> int:
        """The layer in which most directions reach the shift and, of those, lose the fewest words.

        Where none does in any, the one in which they come closest. found: (layer, direction) -> α.
        """

        def worth(layer: int) -> tuple[int, float, float]:
            mine = {direction: one for (where, direction), one in found.items() if where == layer}
            reached = [direction for direction, one in mine.items() if one.reached]
            near = [-abs(one.share - 1) if np.isfinite(one.share) else -np.inf for one in mine.values()]
            return len(reached), -self._lost(layer, name, reached), float(np.mean(near))

        return max(self.cfg["layers"], key=worth)

    def _lost(self, layer: int, name: str, reached: Sequence[str]) -> float:
        rows = pd.DataFrame(self.rows)
        if not reached or "errors_monologue" not in rows:
            return 0.0
        mine = rows[(rows["layer"] == layer) & (rows["property"] == name) & rows["direction"].isin(reached)]
        mine = mine[mine["matched"] == "reached"]
        lost = mine[["errors_monologue", "errors_prompt"]].sum().sum()
        return float(lost / max(mine[["words_monologue", "words_prompt"]].sum().sum(), 1))


# --- what it is asked


def asked_of(
    model: Moshi, judge: Judge, cfg: SteeringCfg, inputs: Inputs
) -> tuple[list[Asked], list[Asked], list[Asked] | None]:
    """(prompts of val, of test, those of test with the other voice's prompt, where voices are prompted).

    Sentences are drawn from the grammar's part of that name and are none of the folder's, so that nothing was trained,
    found or chosen on those of test; voices take turns.
    """
    asks = cfg["prompts"]
    if asks["source"] == "sentences":
        if asks["sentences"] is None:
            raise EqknobsError("config: lm_steering.prompts.sentences: name a folder, or take source: speech")
        encode_speech(asks["sentences"], inputs["codes"], model.codec, model.config.codebooks, levels=1, seed=0)
        parts = read_clips(asks["sentences"], inputs["codes"])
        every = [clip for clips in parts.values() for clip in clips]
        longest = max(every, key=lambda clip: clip.codes.shape[2])
        known, texts = parts["train"], {clip.text for clip in every}
        embeddings = judge.voices(Sequences(known, model.tokeniser(), model.config))
        names = sorted(embeddings)

        def told(part: str, count: int, turn: int = 0) -> list[Asked]:
            said = drawn(part, count, cfg["seed"], texts)
            clips = [replace(longest, voice=names[(i + turn) % len(names)], text=t) for i, t in enumerate(said)]
            return Sentences(model, clips, known).asked(embeddings)

        return told("val", asks["val"]), told("test", asks["test"]), told("test", asks["test"], 1)
    if inputs["manifest"] is None:
        raise EqknobsError("config: lm_steering.prompts: source speech needs the run's manifest")
    table = read_csv(inputs["manifest"])
    talk = Talk(seconds=asks.get("seconds") or 12.0, text=asks.get("text"), voice=asks.get("voice"))
    val, test = (
        conversations(model, pick_clips(table, split, count), talk, judge.encoder)
        for split, count in (("val", asks["val"]), ("test", asks["test"]))
    )
    return val, test, None


def voices_of(model: Moshi, judge: Judge, turns_csv: str) -> list[tuple[str, np.ndarray]]:
    """The two voices between which is steered, with the mean embedding of train clips through the codec; none where
    there are not two."""
    turns = read_csv(turns_csv)
    known = turns[(turns["stream"] == "agent") & (turns["split"] == "train")].sort_values("id")
    found = []
    for name in two_voices(turns) or ():
        embeddings = []
        for clip in known[known["speaker"] == name].head(CLIPS).itertuples():
            codes = model.codes(read_clip(clip, model.sample_rate))
            embeddings.append(
                judge.encoder.embed(judge.at_judges_rate(model.speech(codes, codes.shape[1] * model.hop)))
            )
        mean = np.mean(embeddings, axis=0)
        found.append((name, mean / np.linalg.norm(mean)))
    return found


# --- all of it


def conditions_of(
    name: str, layer: int, steps: dict[str, np.ndarray], found: dict[str, Found], cfg: SteeringCfg, plain: bool
) -> list[Condition]:
    """What speaks on test for one property: directions at their α and at multiples of it, random ones as long, and
    what shifts without steering."""
    wanted, out = cfg["shifts"][name], []
    sign = np.float32(1 if wanted > 0 else -1)
    for direction, one in found.items():
        at = Condition(name, direction, 0, layer, one.alpha, shift=wanted, step=sign * steps[direction])
        out.append(replace(at, matched="reached" if one.reached else "unreached"))
        out += [replace(at, matched="multiple", alpha=one.alpha * times) for times in cfg["multiples"]]
    for direction in [name for name in cfg["random"]["beside"] if name in found]:
        for seed in range(cfg["random"]["seeds"]):
            step, alpha = sign * steps[f"random:{seed}"], found[direction].alpha
            out.append(Condition(name, "random", seed, layer, alpha, "same_length", direction, wanted, step))
    if plain:
        out.append(Condition(name, PLAIN[name], matched="plain", shift=wanted))
    return out


def write_sounds(bench: SteerBench, conditions: Sequence[Condition], folder: Path) -> None:
    """The first answers of the intact model, of directions at their α, of one random direction and of what is not
    steered."""
    played = [INTACT] + [c for c in conditions if c.matched in ("reached", "unreached", "plain")]
    randoms = {c.what: c for c in reversed(conditions) if c.matched == "same_length"}
    takes = (
        Take(c.name, c.row(), asked, answer, bench.sound(c, answer))
        for c in [*played, *randoms.values()]
        for asked, answer in zip(bench.asked[: bench.cfg["listen"]], bench.answers(c), strict=False)
    )
    write_takes(bench.judge, takes, folder)


def steer_and_score(cfg: SteeringCfg, inputs: Inputs, out: Outputs, pieces: Pieces | None = None) -> None:
    """Calibrate on val, speak on test. Each file appears when it is whole.

    out.calibration: one row a layer, direction, α and prompt of val; `value` and `intact` (Hz, dB, similarity),
    `shift`, and word errors where layers are chosen by them. out.answers: one record an answer of test.
    """
    pieces = pieces or Pieces(None)
    model = Moshi(cfg["model"])
    judge = Judge(model, cfg["judges"], pieces)
    made_of = [model.revision, {k: v for k, v in cfg["model"].items() if k != "device"}]
    own = pieces.within([*made_of, [content(file) for file in module_inputs(__name__)]])
    voices = voices_of(model, judge, inputs["turns"])
    val, test, turned = asked_of(model, judge, cfg, inputs)
    bench = SteerBench(model, judge, test, turned, voices, cfg, own)
    calibration = Calibration(SteerBench(model, judge, val, None, voices, cfg, own), cfg)
    caches = read_index(inputs["index"])["caches"]["trained"]
    conditions: list[Condition] = []
    for name in cfg["shifts"]:
        steps: dict[int, dict[str, np.ndarray]] = {}
        found: dict[tuple[int, str], Found] = {}
        for layer in cfg["layers"]:
            sae = None if inputs["saes"] is None else inputs["saes"] / f"residual.{layer}"
            files = Files(inputs["turns"], inputs["labels"], caches[f"residual.{layer}"], sae)
            steps[layer] = find(files, name, cfg, cfg["random"]["seeds"], model.device)
            for direction in cfg["directions"]:
                found[layer, direction] = calibration.solve(layer, name, direction, steps[layer][direction])
                print(f"{name}, layer {layer}, {direction}: {found[layer, direction]}", flush=True)
        layer = calibration.chosen(name, found)
        mine = {direction: one for (where, direction), one in found.items() if where == layer}
        conditions += conditions_of(name, layer, steps[layer], mine, cfg, name != VOICE or turned is not None)
    about = {"model": model.name, "split": "val"}
    write_csv(out["calibration"], pd.DataFrame([about | row for row in calibration.rows]))
    draws = range(max(2, cfg["draws"]))
    bench.intact = {draw: bench.answers(INTACT, draw) for draw in draws}
    records = [row for draw in draws for row in bench.score(INTACT, draw)]
    shown = tqdm(conditions, desc="answers", unit="condition")
    records += [row for c in shown for draw in range(cfg["draws"]) for row in bench.score(c, draw)]
    write_csv(out["answers"], pd.DataFrame([about | {"split": "test"} | row for row in records]))
    write_sounds(bench, conditions, Path(out["sounds"]))
