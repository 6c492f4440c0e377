"""Checks of `data` and `labels` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError

CREPE_HZ = (32, 2005)  # the lowest and highest pitch it has a class for


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for values that are possible each, but not together."""
    for section, low, high in (("labels", "fmin", "fmax"), ("data", "min_seconds", "max_seconds")):
        below, above = config[section][low], config[section][high]
        if below >= above:
            raise EqknobsError(f"config: {section}.{low}: {below} must be below {section}.{high}, which is {above}")
    for key, good in (
        ("fmin", config["labels"]["fmin"] < CREPE_HZ[1]),
        ("fmax", config["labels"]["fmax"] > CREPE_HZ[0]),
    ):
        if not good:
            raise EqknobsError(
                f"config: labels.{key}: {config['labels'][key]} leaves no pitch that CREPE knows, "
                f"{CREPE_HZ[0]} to {CREPE_HZ[1]} Hz"
            )
    data = config["data"]
    if 60 * data["max_minutes"] < 3 * data["min_seconds"]:
        raise EqknobsError(
            f"config: data.max_minutes: {data['max_minutes']:g} leaves no room for three clips of data.min_seconds, "
            f"{data['min_seconds']:g}"
        )
    needed = "subset" if data["source"] == "librispeech" else "path"
    if data[needed] is None:
        raise EqknobsError(f"config: data.{needed}: is null, but data.source {data['source']!r} needs it")
    if data.get("speaker_from") == "labels" and not data["labels"]:
        raise EqknobsError("config: data.labels: is null, but data.speaker_from names it; give a CSV")
    if data["split_by"] and not data["labels"]:
        raise EqknobsError("config: data.split_by: needs data.labels, a CSV that has this column; give it, or set null")
    if abs(sum(data["splits"].values()) - 1) > 1e-6:
        raise EqknobsError("config: data.splits: the three shares must add up to 1")
