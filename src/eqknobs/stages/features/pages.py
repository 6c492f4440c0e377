"""What a page shows of a feature, from what the stage kept of it; for the report and for `eqknobs explore`."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from eqknobs.evidence.listening import data_uri, loudest_band, magma, mp3, spectrogram
from eqknobs.evidence.wording import PROPERTIES

WHY = {
    "label": "tells a label best",
    "phone": "named after a phone",
    "domain": "belongs to a domain",
    "frequent": "fires most often",
    "strong": "largest activation",
    "random": "drawn at random",
}
PARTS = {"split": "Part of the corpus", "domain": "Domain"}  # what comes first of all labels
MAPS = {"feature": "where it fires", "random": "random frames", "matched": "frames of the same level"}
MAP_SIZE = (204, 120)  # pixels


def curve(points: list[list[float]], seconds: float, most: float) -> str:
    """Points of an SVG polygon, in per cent of a picture: an activation over time, [[s, value]]; most: the top."""
    if not points:
        return ""
    drawn = [(100 * time / seconds, 100 - 92 * max(value, 0.0) / most) for time, value in points]
    corners = [(drawn[0][0], 100.0), *drawn, (drawn[-1][0], 100.0)]
    return " ".join(f"{x:.2f},{y:.1f}" for x, y in corners)


def sounding(wav: np.ndarray, rate: int) -> dict[str, str]:
    """{sound, picture} of a waveform [samples], as addresses that a page holds."""
    picture = spectrogram(wav, rate, loudest_band(wav, rate))
    return {"sound": data_uri("audio/mpeg", mp3(wav, rate)), "picture": data_uri("image/jpeg", picture)}


def moment_shown(found: dict[str, Any], wav: np.ndarray, rate: int, most: float) -> dict[str, Any]:
    """A feature's moment: who speaks, where, the sound [samples], its spectrogram and the activation's curve.

    found: of `compute.moment`; most: the activation at the top of the picture.
    """
    about = {name: found[name] for name in ("id", "speaker", "split", "start", "seconds", "activation")}
    return about | sounding(wav, rate) | {"curve": curve(found["curve"], found["seconds"], most)}


def clips_of(record: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The moments of a feature whose windows were kept."""
    sounds = [(clip, *sf.read(folder / clip["file"], dtype="float32")) for clip in record["clips"]]
    return [moment_shown(clip, wav, rate, record["max"]) for clip, wav, rate in sounds]


def _maps(record: dict[str, Any], row: dict[str, Any], means: np.ndarray) -> list[dict[str, Any]]:
    """The three mean mel maps, all in one scale of colours, with the share of energy right of the centre."""
    drawn = {kind: own for kind, own in zip(MAPS, means, strict=True) if record["map_frames"][kind]}
    if not drawn:
        return []
    low, high = min(own.min() for own in drawn.values()), max(own.max() for own in drawn.values())
    names = {"feature": "onset_share", "random": "onset_random", "matched": "onset_matched"}
    return [
        {
            "title": MAPS[kind],
            "frames": record["map_frames"][kind],
            "picture": data_uri("image/jpeg", magma((own[::-1] - low) / max(high - low, 1e-9), MAP_SIZE)),
            "share": [row.get(names[kind] + end) for end in ("", "_low", "_high")],
        }
        for kind, own in drawn.items()
    ]


def _firing(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Firing rates by label, with the length of each bar in per cent of the longest."""
    most = max((own["rate"] for values in record["firing"].values() for own in values.values()), default=0) or 1
    return [
        {
            "name": PARTS.get(name, PROPERTIES.get(name, name)),
            "rows": [{"value": value, "bar": 100 * own["rate"] / most, **own} for value, own in values.items()],
        }
        for name, values in sorted(record["firing"].items(), key=lambda item: (item[0] not in PARTS, item[0]))
    ]


def badges(record: dict[str, Any]) -> list[str]:
    """Short words beside a feature's number: what other stages call it."""
    labels = [f"{own['property']}: {own['label']}" for own in record["labels"]]
    phone = [f"phone {record['phone']}"] if record["phone"] else []
    return [*labels, *phone, *([record["domain"]] if record["domain"] else [])]


def entry(
    record: dict[str, Any], row: dict[str, Any], means: np.ndarray, folder: Path, captions: list[str]
) -> dict[str, Any]:
    """Everything that a page shows of a feature. row: of `features.csv`; means: its mean mel maps, [3, bands, cells] in
    the order of MAPS; folder: where its windows lie."""
    said = badges(record)
    words = [str(record["feature"]), WHY[record["why"]], *said, *captions]
    return {
        **{name: record[name] for name in ("feature", "rate", "max", "in_clips", "labels", "phone", "domain")},
        **{name: record[name] for name in ("twin", "twin_overlap")},
        "why": WHY[record["why"]],
        "badges": said,
        "captions": captions,
        "words": " ".join(words).lower(),
        "clips": clips_of(record, folder),
        "maps": _maps(record, row, means),
        "firing": _firing(record),
    }
