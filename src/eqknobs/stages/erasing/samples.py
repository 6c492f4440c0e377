"""What is told apart: clips and vowels with their activations and codes, and the tasks that ask for their labels."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.sae import SAE
from eqknobs.sae.firing import clip_codes

PARTS = ("train", "val", "test")
SHARES = {"train": 0.5, "test": 0.25, "val": 0.25}  # of the sentences, where it is told who speaks; test before val
LEAST = 2  # of each value in train; test needs one
ARPABET = frozenset("aa ae ah ao aw ax axr ay eh er ey ih ix iy ow oy uh uw ux".split())


@dataclass(frozen=True)
class Samples:
    """Clips, or vowels of clips, one a row.

    about: id, speaker, split, start and frames (rows of the cache). raw: mean activations [n, d]; most: largest, and
    mean: mean code of each feature over time, [n, m].
    """

    about: pd.DataFrame
    raw: np.ndarray
    most: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Task:
    """A label that some samples have.

    rows: of each of PARTS, places in the samples; codes: their labels, as places in `names`.
    """

    name: str
    samples: Samples
    rows: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    names: list[str]
    by_speaker: bool  # no speaker has two labels, and test speakers are others

    def labels(self) -> pd.Series:
        """Label of each sample that has one, by its row."""
        rows = np.concatenate([self.rows[part] for part in PARTS])
        return pd.Series(np.concatenate([self.codes[part] for part in PARTS]), rows)


def pooled(cache: ActivationCache, sae: SAE, about: pd.DataFrame, k: float) -> Samples:
    """Activations and codes over time of stretches of clips.

    about: id, speaker, split, start, frames, one row a sample, samples of a clip one after another; k: features a
    frame, chosen clip by clip, or 0 for the SAE's own rule (`eqknobs.sae.firing`).
    """
    n, m = len(about), sae.config.d_sae
    raw = np.zeros((n, cache.acts.shape[1]))
    most, mean = np.zeros((n, m), np.float32), np.zeros((n, m), np.float32)
    clips = cache.utterances.set_index("id")
    row = 0
    for id, own in about.groupby("id", sort=False):
        clip = clips.loc[id]
        acts = np.array(cache.acts[clip.start : clip.start + clip.frames])
        code = clip_codes(sae, acts, k)
        for start, frames in zip(own["start"] - clip.start, own["frames"], strict=True):
            raw[row] = acts[start : start + frames].mean(0, dtype=np.float64)
            part = code[start : start + frames]
            most[row], mean[row] = part.max(0).toarray()[0], np.asarray(part.mean(0))[0]
            row += 1
    return Samples(about.reset_index(drop=True), raw, most, mean)


def all_clips(cache: ActivationCache) -> pd.DataFrame:
    """Every clip of a cache, by id: id, speaker, split, start, frames."""
    return cache.utterances.sort_values("id")[["id", "speaker", "split", "start", "frames"]].reset_index(drop=True)


def vowel_segments(
    cache: ActivationCache, labels_h5: str | Path, count: int, most: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Runs of frames that one vowel takes, of the most frequent vowels: (as `all_clips`, codes, the vowels' names).

    count: how many vowels; most: segments of each split, drawn by seed. Raises EqknobsError where the labels hold no
    phones, or fewer than two vowels are said often enough.
    """
    with h5py.File(labels_h5, "r", locking=False) as file:
        if "phone" not in file:
            raise EqknobsError(
                f"{labels_h5}: no phones; give the corpus phone labels, or leave vowels out of the tasks"
            )
        code, names = file["phone"][:].astype(np.int64), list(map(str, file["phone"].attrs["names"]))
    spelt = [re.sub(r"\d$", "", name.lower()) for name in names]
    vowels = sorted(ARPABET & set(spelt))
    place = np.array([vowels.index(name) if name in vowels else -1 for name in spelt] + [-1])
    said = place[code]
    edge = np.flatnonzero(np.diff(said) | np.diff(cache.utt_of_row))
    starts, ends = np.concatenate([[0], edge + 1]), np.concatenate([edge + 1, [len(said)]])
    own = said[starts] >= 0
    starts, ends, found = starts[own], ends[own], said[starts[own]]
    clips = cache.utterances.iloc[cache.utt_of_row[starts]][["id", "speaker", "split"]].reset_index(drop=True)
    table = clips.assign(start=starts, frames=ends - starts, vowel=found)
    by_part = pd.crosstab(table["vowel"], table["split"]).reindex(columns=list(PARTS), fill_value=0)
    often = by_part[(by_part["train"] >= LEAST) & (by_part["test"] >= 1)]
    wanted = often.sort_values("train", ascending=False, kind="stable").index[:count]
    if len(wanted) < 2:
        raise EqknobsError(f"{labels_h5}: fewer than two vowels in train and test; leave vowels out of erasing.tasks")
    table = table[table["vowel"].isin(wanted)]
    drawn = table.iloc[np.random.default_rng([seed, 59]).permutation(len(table))].groupby("split").head(most)
    drawn = drawn.sort_values(["id", "start"]).reset_index(drop=True)
    kept = sorted(wanted, key=lambda v: vowels[v])
    codes = drawn["vowel"].map({v: i for i, v in enumerate(kept)}).to_numpy()
    return drawn.drop(columns="vowel"), codes, [vowels[v] for v in kept]


def sentence_parts(sentences: Sequence[str], voices: Sequence[str], seed: int) -> np.ndarray:
    """Part of each clip such that no sentence is in two, every voice as evenly as possible in all: text [n]."""
    table = pd.DataFrame({"sentence": sentences, "voice": voices})
    rank = {s: hashlib.sha256(f"{seed}/{s}".encode()).hexdigest() for s in set(sentences)}
    held = {part: dict.fromkeys(table["voice"], 0) for part in PARTS}
    chosen = {}
    for sentence in sorted(rank, key=lambda s: rank[s]):
        own = table.loc[table["sentence"] == sentence, "voice"]
        full = {part: sum((held[part][voice] + 1) / share for voice in own) for part, share in SHARES.items()}
        part = min(full, key=lambda name: full[name])
        chosen[sentence] = part
        for voice in own:
            held[part][voice] += 1
    return table["sentence"].map(chosen).to_numpy()


def clip_task(name: str, samples: Samples, manifest: pd.DataFrame, seed: int) -> Task:
    """A category of whole clips as a task.

    Its parts are the splits; where it is told who speaks, clips of val and test (which no SAE learnt from) are parted
    anew by sentence. manifest: by id. Raises EqknobsError where the manifest lacks it, or fewer than two of its values
    are in train and test.
    """
    wanted = PROPERTIES[name]
    if wanted.source not in manifest:
        raise EqknobsError(f"erasing: the manifest has no column {wanted.source}; leave {name} out of erasing.tasks")
    about = samples.about
    own = manifest.loc[about["id"]]
    label = own[wanted.source].fillna("").astype(str).to_numpy()
    part = about["split"].to_numpy().astype(object)
    if not wanted.of_speakers:
        # Music has a performer, but no voice: what has a sex speaks.
        speaks = np.isin(part, ("val", "test")) & (own["sex"].fillna("").to_numpy() != "")
        text = [" ".join(re.findall(r"\w+", str(text).casefold())) for text in own["text"].fillna("")]
        # Without a text each clip stands alone, but a mixture has it twice.
        text = [said or id.removesuffix(".noisy") for said, id in zip(text, about["id"], strict=True)]
        part[~speaks], label = "", np.where(speaks, label, "")
        part[speaks] = sentence_parts(np.array(text)[speaks].tolist(), label[speaks].tolist(), seed)
    counts = pd.crosstab(label, part).reindex(columns=list(PARTS), fill_value=0)
    names = sorted(set(counts.index[(counts["train"] >= LEAST) & (counts["test"] >= 1)]) - {""})
    if len(names) < 2:
        raise EqknobsError(
            f"erasing: train and test have clips of {len(names)} value(s) of {name} only; raise the corpus's limits, "
            f"or leave {name} out of erasing.tasks"
        )
    return _task(name, samples, label, part, names, wanted.of_speakers)


def _task(
    name: str, samples: Samples, label: np.ndarray, part: np.ndarray, names: list[str], of_speakers: bool
) -> Task:
    place = {value: i for i, value in enumerate(names)}
    known = np.isin(label, names)
    rows = {one: np.flatnonzero(known & (part == one)) for one in PARTS}
    codes = {one: np.array([place[value] for value in label[own]], np.int64) for one, own in rows.items()}
    values = pd.Series(label[known]).groupby(samples.about["speaker"].to_numpy()[known]).nunique()
    return Task(name, samples, rows, codes, names, of_speakers and bool((values == 1).all()))


def vowel_tasks(samples: Samples, codes: np.ndarray, names: list[str]) -> list[Task]:
    """Each vowel against the others as a task, `vowel aa`, from what `vowel_segments` found."""
    part = samples.about["split"].to_numpy()
    label = np.array(names)[codes]
    return [
        _task(f"vowel {name}", samples, np.where(label == name, name, "other"), part, ["other", name], False)
        for name in names
    ]


def second_moment(cache: ActivationCache, about: pd.DataFrame) -> np.ndarray:
    """Mean over samples of the mean over their frames of x xᵀ, float64 [d, d]."""
    total = np.zeros((cache.acts.shape[1],) * 2)
    for start, frames in zip(about["start"], about["frames"], strict=True):
        x = np.array(cache.acts[start : start + frames], np.float64)
        total += x.T @ x / frames
    return total / len(about)


def nested(a: Task, b: Task) -> bool:
    """Whether the labels of one decide those of the other where both are known: every voice has one sex."""
    both = pd.concat([a.labels().rename("a"), b.labels().rename("b")], axis=1).dropna()
    if both["a"].nunique() < 2 or both["b"].nunique() < 2:
        return False
    return bool((both.groupby("a")["b"].nunique() == 1).all() or (both.groupby("b")["a"].nunique() == 1).all())
