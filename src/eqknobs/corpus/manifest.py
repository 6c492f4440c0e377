"""Speech: check a corpus's files and draw the manifest."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import audio_seconds, read_audio
from eqknobs.corpus.fetching import SourceCfg, fetch
from eqknobs.corpus.files import (
    ALSO,
    LAYOUTS,
    UNSUPPORTED_SUFFIXES,
    Transcripts,
    few,
    find_clips,
    librispeech_sexes,
    one_line,
    read_labels,
    shown,
    walk,
)
from eqknobs.errors import EqknobsError, counted
from eqknobs.io import file_sha256

__all__ = ["MANIFEST_COLUMNS", "SPLITS", "build_manifest", "fetch", "require_sound", "unite"]

NOWHERE = "link to nowhere"
SILENCE = 1e-3  # −60 dB full scale
RATE_OF_CHECK = 16000
FRAME = 640  # 40 ms at RATE_OF_CHECK
SOUNDING_FRAMES = 5  # a fifth of a second
SPLITS = ("train", "val", "test")
MANIFEST_COLUMNS = ["id", "path", "speaker", "sex", "accent", "seconds", "split", "sha256", "text"]


class CorpusCfg(SourceCfg):
    """What `build_manifest` reads: the section `data`, or a corpus of `corpora` that is no union."""

    labels: NotRequired[str | None]  # a CSV
    speaker_from: NotRequired[str | None]
    max_utterances: NotRequired[int | None]
    max_minutes: NotRequired[float | None]
    min_seconds: float
    max_seconds: float
    splits: dict[str, float]  # shares of speakers (or sentences) of `SPLITS`
    split_by: NotRequired[str | None]  # a column of the labels
    split_unit: NotRequired[str]  # speaker | sentence


def build_manifest(folder: Path, cfg_data: CorpusCfg, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw utterances from a folder of audio: (manifest, rejected); print where the speakers are from.

    Manifest: `id, path, speaker, sex, accent, seconds, split, sha256, text`, and `source` and `domain` where the CSV
    `labels` fills them; rejected: `path, reason`, a row for every file that could not be used, whatever went wrong with
    it, and for every folder and link that was not followed. Speakers come from the layouts of LibriSpeech, LibriTTS or
    VCTK (`eqknobs.corpus.files`), from one folder a speaker, or from what `speaker_from` names; sexes and texts from
    the files that lie beside the sound (`SPEAKERS.TXT`, `*.trans.txt`, `*.normalized.txt`); the CSV `labels` (keyed by
    `id`, `path` or `speaker`) has the last word. The draw goes round the speakers, up to `max_utterances` and
    `max_minutes`; its order and the splits follow from a hash of `seed` and the name, so that a file more or less does
    not reshuffle the others. All files' headers are checked, drawn files are decoded. Splits share no speaker, nor any
    value of the labels column `split_by` if that is set (such as the voice that others are derived from); the sexes are
    spread evenly. With `split_unit: sentence` they share no sentence instead (texts that are equal but for case and
    punctuation), and speakers are in several of them. The manifest's
    `attrs["limited"]` says whether `max_minutes` left clips out.

    Raises EqknobsError when no file is usable, when it cannot be told who speaks in a file, for fewer than three
    speakers, and for labels that are unusable, ambiguous or mostly match nothing.
    """
    folder = Path(folder)
    records, rejected = _scan(folder, cfg_data)
    chosen, limited = _draw(records, rejected, cfg_data, seed)
    if not chosen:
        reasons = Counter(row["reason"].split(" (")[0] for row in rejected).most_common(3)
        detail = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "no audio files found"
        raise EqknobsError(f"{shown(folder)}: no usable utterance left ({detail}); check data.path and the data limits")
    manifest = pd.DataFrame(chosen)
    unit = cfg_data.get("split_unit", "speaker")
    manifest["split"] = manifest["group"].map(_split(manifest, cfg_data["splits"], seed, unit))
    columns = [*MANIFEST_COLUMNS, *(name for name in ALSO if (manifest[name] != "").any())]
    manifest = manifest.sort_values("id", ignore_index=True)[columns]
    manifest.attrs["limited"] = limited
    return manifest, pd.DataFrame(rejected, columns=["path", "reason"]).sort_values("path", ignore_index=True)


def unite(parts: dict[str, pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One corpus put together from others, by name: (manifest, rejected, which is empty).

    Ids and speakers begin with the name of their corpus, as two corpora may have the same ones; a column `domain` holds
    it. Every clip keeps its split. Raises EqknobsError where two corpora hold the same sound.
    """
    manifests = []
    for name, manifest in parts.items():
        named = {column: name + "-" + manifest[column].astype(str) for column in ("id", "speaker")}
        manifests.append(manifest.assign(**named, domain=name))
    united = pd.concat(manifests, ignore_index=True).sort_values("id", ignore_index=True)
    if (twice := united["sha256"].duplicated(keep=False)).any():
        same = united[twice].sort_values("sha256")["path"].iloc[:2]
        raise EqknobsError(f"{same.iloc[0]} and {same.iloc[1]} are the same sound in two corpora; take one out")
    return united, pd.DataFrame(columns=["path", "reason"])


def _rank(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).hexdigest()


def _scan(folder: Path, cfg_data: CorpusCfg) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Files whose header promises usable audio, with what is known of them; and those that are refused."""
    speaker_from = cfg_data.get("speaker_from")
    split_by = (cfg_data.get("split_by") or "speaker").strip().casefold()
    files, left_out = walk(folder)
    clips = find_clips(files, folder, speaker_from)
    sounds = {clip.file for clip in clips}  # what is wrong with those is told below
    left_out |= {path: NOWHERE for path in files if path not in sounds and not os.path.exists(path)}
    rejected = [{"path": shown(path), "reason": reason} for path, reason in left_out.items()]
    stems = Counter(clip.stem for clip in clips)
    for clip in clips:
        digest = hashlib.sha256(clip.name.encode(errors="surrogateescape")).hexdigest()[:8]
        clip.id = clip.stem if stems[clip.stem] == 1 else f"{clip.stem}-{digest}"
    labels = read_labels(cfg_data.get("labels"), None if split_by == "speaker" else split_by, clips)
    rows = labels.match(clips) if labels and clips else [{} for _ in clips]
    sexes, transcripts = librispeech_sexes(folder, files), Transcripts()
    records = []
    for clip, row in zip(tqdm(clips, desc="headers", unit="file"), rows, strict=True):
        try:
            seconds = _header_seconds(clip.file, cfg_data)
            if speaker_from and not (clip.speaker or row.get("speaker")):
                raise EqknobsError(f"no speaker by data.speaker_from: {speaker_from}")
            text = transcripts.text(clip)
        except Exception as error:  # whatever is wrong with one file, the others are none the worse
            rejected.append({"path": shown(clip.file), "reason": _reason(clip.file, error)})
            continue
        known = {"speaker": clip.speaker, "sex": sexes.get(clip.speaker, ""), "accent": "", "text": text}
        known = {name: row.get(name, value) for name, value in known.items()}
        known["sex"] = known["sex"][:1].upper() if known["sex"][:1].upper() in ("F", "M") else ""
        known |= {name: row.get(name, "") for name in ALSO}
        record = {"file": clip.file, "name": clip.name, "layout": clip.layout, "id": clip.id, "seconds": seconds}
        group = (row | known).get(split_by, "")  # other columns of the labels may be called as keys of a record are
        records.append(record | known | {"named": "speaker" in row, "group": group})
    _report_speakers(folder, records, cfg_data)
    if cfg_data.get("split_unit") == "sentence":
        _group_by_sentence(folder, records)
    else:
        _fill_groups(records, split_by)
    return records, rejected


def _fill_groups(records: list[dict[str, Any]], split_by: str) -> None:
    """Clips without a value of `split_by` go with their speaker; prints how many."""
    without = [record for record in records if not record["group"]]
    for record in without:
        record["group"] = record["speaker"]
    if without:
        print(
            f"data.split_by: {counted(len(without), 'clip')} without a value of {split_by!r} "
            f"({few(record['name'] for record in without)}): split by speaker",
            flush=True,
        )


def _group_by_sentence(folder: Path, records: list[dict[str, Any]]) -> None:
    """Clips of one sentence go together, one without a text on its own; prints how many. Raises EqknobsError if all."""
    for record in records:
        record["group"] = " ".join(re.findall(r"\w+", record["text"].casefold()))
    without = [record for record in records if not record["group"]]
    for record in without:
        record["group"] = f"/{record['name']}"
    if without and len(without) == len(records):
        raise EqknobsError(
            f"{shown(folder)}: no clip has a text, which data.split_unit: sentence needs; "
            "give texts in data.labels, or set it to speaker"
        )
    if without:
        names = few(record["name"] for record in without)
        print(f"data.split_unit: {counted(len(without), 'clip')} without a text ({names}): each on its own", flush=True)


def _report_speakers(folder: Path, records: list[dict[str, Any]], cfg_data: CorpusCfg) -> None:
    """Print where the speakers are from. Raises EqknobsError where that cannot be told of a file."""
    nameless = [record for record in records if not record["speaker"]]
    if nameless:
        layouts = {record["layout"] for record in nameless}
        why = "in folders within folders" if "" in layouts else "of Common Voice, whose tables name the speakers"
        raise EqknobsError(
            f"{shown(folder)}: {counted(len(nameless), 'file')} {why}, so that who speaks in them cannot be told "
            f"({few(record['name'] for record in nameless)}); set data.speaker_from to parent, grandparent or top, "
            "or name every file's speaker in data.labels"
        )
    speakers: dict[str, set[str]] = {}
    clips: Counter[str] = Counter()
    for record in records:
        chosen = f"data.speaker_from: {cfg_data.get('speaker_from')}"
        source = "data.labels" if record["named"] else chosen if cfg_data.get("speaker_from") else None
        source = source or LAYOUTS[record["layout"]]
        speakers.setdefault(source, set()).add(record["speaker"])
        clips[source] += 1
    parts = [
        f"{source}: {counted(len(speakers[source]), 'speaker')}, {counted(n, 'clip')}" for source, n in clips.items()
    ]
    if parts:
        print(f"{shown(folder)}: who speaks is from {'; '.join(parts)}", flush=True)


def _header_seconds(path: Path, cfg_data: CorpusCfg) -> float:
    if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
        raise EqknobsError("format not supported (convert to FLAC or WAV)")
    if not path.is_file():
        raise EqknobsError("not a regular file" if os.path.exists(path) else NOWHERE)
    if not Path(shown(path)).is_file():  # what the manifest would say
        raise EqknobsError("name is not UTF-8 (rename the file)")
    seconds = audio_seconds(path)
    if seconds == 0:
        raise EqknobsError("empty")
    if seconds < cfg_data["min_seconds"]:
        raise EqknobsError(f"too short ({seconds:.2f} s)")
    if seconds > cfg_data["max_seconds"]:
        raise EqknobsError(f"too long ({seconds:.2f} s)")
    return seconds


def _reason(path: Path, error: Exception) -> str:
    """What to say in rejected.csv of an error that one file made."""
    if isinstance(error, EqknobsError):
        return str(error).removeprefix(f"{path}: ").split(";")[0]
    return one_line(f"cannot be read ({type(error).__name__}: {error})")


def _draw(
    records: list[dict[str, Any]], rejected: list[dict[str, str]], cfg_data: CorpusCfg, seed: int
) -> tuple[list[dict[str, Any]], bool]:
    """One utterance of each speaker in turn until a limit is reached; unusable ones go to `rejected`.

    Returns them, and whether `max_minutes` left any out.
    """
    queues: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: _rank(seed, r["name"])):
        queues.setdefault(record["speaker"], []).append(record)
    speakers = sorted(queues, key=lambda name: _rank(seed, name))
    room = 60 * (cfg_data.get("max_minutes") or np.inf)
    number = cfg_data.get("max_utterances") or len(records)
    chosen: list[dict[str, Any]] = []
    limited = False
    seen: set[str] = set()
    with tqdm(desc="draw", total=min(number, len(records)), unit="clip") as bar:
        while len(chosen) < number and any(queues.values()):
            for speaker in speakers:
                while queues[speaker] and len(chosen) < number:
                    record = queues[speaker].pop(0)
                    if record["seconds"] > room:
                        limited = True
                        continue
                    try:
                        digest = file_sha256(record["file"])
                        require_sound(record["file"])
                        if digest in seen:
                            raise EqknobsError("same content as another file")
                    except Exception as error:
                        rejected.append({"path": shown(record["file"]), "reason": _reason(record["file"], error)})
                        continue
                    seen.add(digest)
                    room -= record["seconds"]
                    chosen.append(record | {"path": shown(record["file"]), "sha256": digest})
                    bar.update()
                    break
    return chosen, limited


def require_sound(path: Path) -> None:
    """Raise EqknobsError, with the reason, for a file whose samples are of no use.

    Besides what `read_audio` refuses that is silence: less than a fifth of a second above −60 dB full scale, whatever
    the peak (a click is no speech) and the mean (nor is a constant).
    """
    wav = read_audio(path, RATE_OF_CHECK)
    frames = wav[: len(wav) // FRAME * FRAME].reshape(-1, FRAME) if len(wav) >= FRAME else wav[None]
    levels = np.sort(frames.std(axis=1, dtype=np.float64))[::-1]  # of each frame, its mean taken out
    if levels[min(SOUNDING_FRAMES, len(levels)) - 1] < SILENCE:
        kind = "silent" if np.abs(wav).max() < SILENCE else "all but silent"
        raise EqknobsError(f"{kind} (peak {np.abs(wav).max():.1e}, mean {wav.mean():.1e})")


def _split(manifest: pd.DataFrame, fractions: dict[str, float], seed: int, unit: str) -> dict[str, str]:
    """Split by group. Groups are put in an order whose every stretch holds the sexes in proportion, and cut."""
    if abs(sum(fractions[name] for name in SPLITS) - 1) > 1e-6:
        raise EqknobsError(f"data.splits: train, val and test add up to {sum(fractions.values()):g}, not to 1")
    torn = manifest.groupby("speaker")["group"].nunique()
    if unit == "speaker" and (torn > 1).any():
        values = sorted(manifest["group"][manifest["speaker"] == torn.idxmax()].unique())
        raise EqknobsError(
            f"data.split_by: speaker {torn.idxmax()} has several values ({few(values)}); give a speaker just one"
        )
    sexes = manifest.groupby("group")["sex"].agg(lambda values: values.mode().iloc[0])
    total = len(sexes)
    if total < len(SPLITS):
        noun = unit if unit != "speaker" or (manifest["group"] == manifest["speaker"]).all() else "speaker group"
        raise EqknobsError(
            f"{counted(total, noun)} left, but train, val and test must not share {unit}s and need at least 3; "
            f"add {unit}s, or name them in data.labels"
        )
    ranked = sexes.index.to_series().map(lambda name: _rank(seed, name)).sort_values().index
    sexes = sexes[ranked]
    place = sexes.groupby(sexes).cumcount().add(0.5) / sexes.groupby(sexes).transform("size")
    order = place.sort_values(kind="stable").index
    test, val = (max(1, round(fractions[name] * total)) for name in ("test", "val"))
    while test + val >= total:  # train keeps a speaker
        test, val = (test - 1, val) if test > val else (test, val - 1)
    return {name: "test" if i < test else "val" if i < test + val else "train" for i, name in enumerate(order)}
