"""What a Whisper is let hear: sounds in which nobody speaks, and speech that is clean, quiet or noisy.

Every domain of non-speech has held-out sources: pieces of music and sounds by the manifest, and kinds of noise that val
has not. A clip's speaker is what it shares with others: the piece that it is cut from, or the voice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pandas as pd

from eqknobs.audio import read_clip
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv
from eqknobs.sound.renders import pick_clips

SPLITS = ("train", "val", "test")
NOISES = {"val": ("white", "pink"), "test": ("brown", "hum", "babble")}
SILENCES = (None, -80.0, -60.0)  # RMS of white noise, dB full scale; None: zeros
CONDITIONS = ("clean", "quiet", "noisy")
UNDER_SPEECH = {"val": "pink", "test": "babble"}  # noise that noisy speech is mixed with
TALKERS = 8
LEVEL_DB = -23.0  # RMS of a noise, as that of the bundled sounds
SECONDS = 3.0


class Heard(NamedTuple):
    """A clip: sound float32 [samples], its domain, and its words ("" where nobody speaks)."""

    id: str
    speaker: str
    split: str
    domain: str
    wav: np.ndarray
    text: str


class ClipsCfg(TypedDict):
    """What decides which clips are heard."""

    held_out: list[str]
    clips: dict[str, int]
    speech: dict[str, int]
    quiet_db: float
    snr_db: float
    seed: int


def rms_db(wav: np.ndarray) -> float:
    """RMS level of a sound [samples], dB full scale; −240 for zeros."""
    return float(20 * np.log10(np.sqrt(np.mean(np.square(wav, dtype=np.float64))) + 1e-12))


def at_level(wav: np.ndarray, level_db: float) -> np.ndarray:
    """A sound [samples] at an RMS level, float32; zeros stay zeros."""
    return (wav * 10 ** ((level_db - rms_db(wav)) / 20)).astype(np.float32) if np.any(wav) else wav.astype(np.float32)


def noise(kind: str, samples: int, rate: int, rng: np.random.Generator, voices: Sequence[np.ndarray]) -> np.ndarray:
    """A noise [samples] at `LEVEL_DB`: white, pink (−3 dB an octave), brown (−6 dB), hum (50 Hz and its harmonics), or
    babble: `voices` [samples] each, backwards, so that nothing in it can be understood."""
    if kind == "hum":
        time = np.arange(samples) / rate
        phases = rng.uniform(0, 2 * np.pi, 20)
        return at_level(sum(np.sin(2 * np.pi * 50 * h * time + phases[h - 1]) / h for h in range(1, 21)), LEVEL_DB)
    if kind == "babble":
        mixed = np.zeros(samples)
        for voice in voices:
            mixed += np.roll(np.resize(at_level(voice, LEVEL_DB)[::-1], samples), int(rng.integers(samples)))
        return at_level(mixed, LEVEL_DB)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    slope = {"white": 0.0, "pink": 0.5, "brown": 1.0}[kind]
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / rate), 20.0)
    return at_level(np.fft.irfft(spectrum / frequency**slope, samples), LEVEL_DB)


def mixed(wav: np.ndarray, under: np.ndarray, snr_db: float) -> np.ndarray:
    """Speech [samples] with noise [samples] at a signal-to-noise ratio, no louder than full scale."""
    found = wav + at_level(under, rms_db(wav) - snr_db)
    return (found / max(1.0, float(np.abs(found).max()))).astype(np.float32)


def sourced(manifest: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """The rows of a manifest without test's own sources in train and val, and without others in test.

    Raises EqknobsError where sources are held out but the manifest names none.
    """
    if not held_out:
        return manifest
    if "source" not in manifest:
        raise EqknobsError("hallucination.held_out: the labels name no source; add that column, or set held_out: []")
    return manifest[manifest["source"].isin(held_out) == (manifest["split"] == "test")]


def non_speech(manifests: Mapping[str, str | Path], split: str, rate: int, cfg: ClipsCfg) -> list[Heard]:
    """Clips of each corpus of a split, from the sources that it may hear."""
    found = []
    for corpus, path in sorted(manifests.items()):
        rows = sourced(read_csv(path), cfg["held_out"])
        if rows[rows["split"] == split].empty:
            raise EqknobsError(
                f"hallucination: {corpus} has no {split} clip; change hallucination.held_out or its splits"
            )
        for row in pick_clips(rows, split, cfg["clips"][split]).itertuples():
            name, piece = f"{corpus}-{row.id}", f"{corpus}-{row.speaker}"
            found.append(Heard(name, piece, split, corpus, read_clip(row, rate), ""))
    return found


def made(split: str, rate: int, voices: Sequence[np.ndarray], cfg: ClipsCfg) -> list[Heard]:
    """Noises and silence of a split, of each as many as of a corpus."""
    samples, found = round(SECONDS * rate), []
    for i in range(cfg["clips"][split]):
        rng = np.random.default_rng([cfg["seed"], SPLITS.index(split), i])
        kind = NOISES[split][i % len(NOISES[split])]
        name = f"noise-{kind}-{i}"
        found.append(Heard(name, name, split, "noise", noise(kind, samples, rate, rng, voices), ""))
        level = SILENCES[i % len(SILENCES)]
        wav = rng.standard_normal(samples) if level is not None else np.zeros(samples)
        name = f"silence{'' if level is None else f'{level:g}'}-{i}"
        found.append(Heard(name, name, split, "silence", at_level(wav, level or 0.0), ""))
    return found


def speech(
    manifest_csv: str | Path,
    split: str,
    rate: int,
    voices: Sequence[np.ndarray],
    cfg: ClipsCfg,
    reference: Any | None = None,
) -> list[Heard]:
    """Clips of speech, each clean, quiet and noisy. Raises EqknobsError for one without a text.

    reference: a loaded Whisper whose transcript of the untouched clip is its text.
    """
    found = []
    for i, row in enumerate(pick_clips(read_csv(manifest_csv), split, cfg["speech"][split]).itertuples()):
        text = str(row.text) if reference is None else _heard_by(reference, row)
        if not (text := text.strip()):
            why = "no text; give texts, name a splicing.reference" if reference is None else "no words to the reference"
            raise EqknobsError(f"hallucination: {row.id} of {manifest_csv} has {why}, or set it to null")
        wav = read_clip(row, rate)
        rng = np.random.default_rng([cfg["seed"], SPLITS.index(split), i, 1])
        under = noise(UNDER_SPEECH[split], len(wav), rate, rng, voices)
        quiet = (wav * 10 ** (cfg["quiet_db"] / 20)).astype(np.float32)
        for condition, sound in zip(CONDITIONS, (wav, quiet, mixed(wav, under, cfg["snr_db"])), strict=True):
            found.append(Heard(f"{row.id}.{condition}", str(row.speaker), split, condition, sound, text))
    return found


def _heard_by(model: Any, row: Any) -> str:
    return str(model.transcribe([read_clip(row, model.sample_rate)])[0])


def heard_clips(
    speech_csv: str | Path,
    manifests: Mapping[str, str | Path],
    split: str,
    rate: int,
    cfg: ClipsCfg,
    reference: Any | None = None,
) -> list[Heard]:
    """All clips of val or test: corpora of non-speech, noises, silence, speech in three conditions (see `speech`)."""
    talkers = pick_clips(read_csv(speech_csv), "train", TALKERS)
    voices = [read_clip(row, rate) for row in talkers.itertuples()]
    clips = [*non_speech(manifests, split, rate, cfg), *made(split, rate, voices, cfg)]
    return [*clips, *speech(speech_csv, split, rate, voices, cfg, reference)]
