"""Speech in which accent is crossed with speaker, which natural corpora never give: espeak-ng says the same sentences
in every accent with every voice variant, at one level.

espeak-ng (GPL v3) comes with the package `espeakng-loader` and is asked for only here; nothing of it ships with this
project. A clip depends on its accent, its variant and its sentence alone: the library keeps state between sentences, so
it is loaded afresh for each (some milliseconds).
"""

import _ctypes
import ctypes
import hashlib
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd

from eqknobs.audio import write_flac
from eqknobs.corpus.manifest import MANIFEST_COLUMNS, SPLITS
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256

RATE = 22050  # of espeak-ng's formant synthesis, samples/s
SYNCHRONOUS, NO_EXIT, UTF8 = 2, 1 << 15, 1  # speak_lib.h: AUDIO_OUTPUT_SYNCHRONOUS, espeakINITIALIZE_DONT_EXIT
FRAME = 441  # 20 ms
FLOOR_DB = -40  # frames this far below the loudest are pauses
LIMIT = 0.98  # of full scale, for the few peaks that levelling would clip


class SynthesisCfg(TypedDict):
    """What is said and by whom: `accent.synthesis`, or a corpus of `corpora` with `source: synthesis`."""

    accents: list[str]  # espeak-ng's voices
    variants: list[str]  # its voice variants: the speakers
    sentences: str  # a file, one a line
    count: int  # how many of them, from the first on
    level_db: float  # RMS of what is no pause, dB full scale
    splits: dict[str, float]  # shares of the variants; of the sentences, `test` alone
    seed: NotRequired[int]
    content: NotRequired[dict[str, str]]


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise EqknobsError(
            "synthetic accents need espeak-ng: run .venv/bin/pip install espeakng-loader==0.2.4, or take a corpus of "
            "your own"
        ) from error
    return espeakng_loader


def sex_of(variant: str) -> str:
    """ "M", "F" or "", as the variant's file says. Raises EqknobsError if espeak-ng has no such variant."""
    folder = Path(_loader().get_data_path()) / "voices" / "!v"
    file = folder / variant
    if not file.is_file():
        known = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise EqknobsError(f"synthesis, variants: espeak-ng has no variant {variant!r}; it has {known}")
    for line in file.read_text("utf-8", "replace").splitlines():
        if line.split()[:1] == ["gender"]:
            return {"male": "M", "female": "F"}.get(line.split()[1], "")
    return ""


def say(accent: str, variant: str, text: str) -> np.ndarray:
    """espeak-ng's float32 samples [samples] in −1…1 at `RATE`. Raises EqknobsError for unknown accents, or if it says
    nothing."""
    loader = _loader()
    library = ctypes.CDLL(loader.get_library_path())
    pieces: list[np.ndarray] = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    @kind
    def keep(wav: Any, samples: int, _events: Any) -> int:
        if wav and samples:
            pieces.append(np.ctypeslib.as_array(wav, (samples,)).copy())
        return 0

    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, loader.get_data_path().encode(), NO_EXIT)
        if rate != RATE:
            raise EqknobsError(f"espeak-ng starts at {rate} samples/s, not {RATE}; install espeakng-loader==0.2.4")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(keep)
        if library.espeak_SetVoiceByName(f"{accent}+{variant}".encode()):
            raise EqknobsError(f"synthesis, accents: espeak-ng has no voice {accent!r}; see espeak-ng --voices=en")
        given = text.encode() + b"\0"
        library.espeak_Synth(given, ctypes.c_size_t(len(given)), 0, 0, 0, UTF8, None, None)
        library.espeak_Synchronize()
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    if not pieces:
        raise EqknobsError(f"espeak-ng says nothing for {text!r} as {accent}+{variant}; mend that sentence")
    return (np.concatenate(pieces) / 32768).astype(np.float32)


def levelled(wav: np.ndarray, level_db: float) -> np.ndarray:
    """The clip without silence at its ends, the RMS of its frames that are no pause at `level_db` dB full scale."""
    frames = np.pad(wav, (0, -len(wav) % FRAME)).reshape(-1, FRAME)
    power = (frames.astype(np.float64) ** 2).mean(1)
    sounding = np.flatnonzero(power > power.max() * 10 ** (FLOOR_DB / 10))
    gain = 10 ** (level_db / 20) / np.sqrt(power[sounding].mean())
    kept = wav[sounding[0] * FRAME : (sounding[-1] + 1) * FRAME] * gain
    return np.clip(kept, -LIMIT, LIMIT).astype(np.float32)


def allotted(names: dict[str, str], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Split of each name; names: name -> group, of which each split gets its share. By a hash of seed and name.

    Raises EqknobsError if a split of a positive share would stay empty.
    """
    groups = pd.Series(names)
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    groups = groups[ranked]
    place = groups.groupby(groups).cumcount().add(0.5) / groups.groupby(groups).transform("size")
    order = list(place.sort_values(kind="stable").index)
    counts = {split: round(share * len(order)) for split, share in shares.items()}
    empty = [split for split, share in shares.items() if share > 0 and counts[split] < 1]
    if empty or sum(counts[split] for split in ("test", "val") if split in counts) >= len(order):
        raise EqknobsError(f"synthesis, splits: {len(order)} are too few to split by {shares}; give more")
    found, start = dict.fromkeys(order, "train"), 0
    for split in ("test", "val"):
        for name in order[start : start + counts.get(split, 0)]:
            found[name] = split
        start += counts.get(split, 0)
    return found


def sentences_of(path: str | Path, count: int) -> list[str]:
    """The first `count` lines that say something. Raises EqknobsError if there are fewer, or no such file."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise EqknobsError(f"synthesis, sentences: {path} cannot be read ({error.strerror})") from error
    if len(lines) < count:
        raise EqknobsError(f"synthesis, count: {path} has {len(lines)} sentences, not {count}; add some")
    return lines[:count]


def synthesise(folder: str | Path, cfg: SynthesisCfg, seed: int) -> pd.DataFrame:
    """Write one FLAC a clip into `folder`; return their manifest (columns as of any corpus; `speaker` is the variant).

    Test has variants and sentences that train and val have not; train and val share sentences, not variants. Raises
    EqknobsError if espeak-ng is not there, or knows an accent or a variant not.
    """
    texts = sentences_of(cfg["sentences"], cfg["count"])
    shares = {split: cfg["splits"][split] for split in SPLITS}
    sexes = {variant: sex_of(variant) for variant in cfg["variants"]}
    of_variant = allotted(sexes, shares, seed)
    of_text = allotted({text: "" for text in texts}, {"test": shares["test"]}, seed)
    rows = []
    for accent in sorted(cfg["accents"]):
        for variant in sorted(cfg["variants"]):
            split = of_variant[variant]
            for number, text in enumerate(texts):
                if (split == "test") != (of_text[text] == "test"):
                    continue
                name = f"{accent}.{variant.replace(' ', '_')}.{number:03d}"
                path = Path(folder) / f"{name}.flac"
                wav = levelled(say(accent, variant, text), cfg["level_db"])
                write_flac(path, wav, RATE)
                row: dict[str, Any] = {
                    "id": name,
                    "path": str(path),
                    "speaker": variant,
                    "sex": sexes[variant],
                    "accent": accent,
                }
                row |= {"seconds": round(len(wav) / RATE, 4), "split": split, "sha256": file_sha256(path)}
                rows.append(row | {"text": text})
    return pd.DataFrame(rows, columns=MANIFEST_COLUMNS).sort_values("id", ignore_index=True)
