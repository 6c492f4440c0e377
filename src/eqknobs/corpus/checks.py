"""Checks of `data`, `corpora` and `labels` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import check_corpus, corpus_config

MADE = ("union", "mixture")  # of other corpora
CREPE_HZ = (32, 2005)  # the lowest and highest pitch it has a class for


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for values that are possible each, but not together."""
    _check_pitch(config["labels"])
    _check_corpus("data", config["data"])
    for name, corpus in config.get("corpora", {}).items():
        if corpus["source"] == "synthesis":
            check_shares(f"corpora.{name}", corpus["splits"])
            continue
        if corpus["source"] not in MADE:
            _check_corpus(f"corpora.{name}", corpus)
            continue
        if corpus["source"] == "mixture" and corpus["snr_db"][0] > corpus["snr_db"][1]:
            raise EqknobsError(f"config: corpora.{name}.snr_db: from {corpus['snr_db'][0]} to less; turn it round")
        for key in ("of", "noise"):
            for part in corpus.get(key, []):
                check_corpus(config, f"corpora.{name}.{key}", part)
                if (made := corpus_config(config, part)["source"]) in MADE:
                    raise EqknobsError(f"config: corpora.{name}.{key}: {part} is a {made} itself; name its parts")


def check_shares(key: str, splits: dict[str, float]) -> None:
    """Raises EqknobsError, naming the key, where the splits' shares are not the whole."""
    if abs(sum(splits.values()) - 1) > 1e-6:
        raise EqknobsError(f"config: {key}.splits: the three shares must add up to 1")


def _check_range(section: str, low: str, high: str, values: dict[str, Any]) -> None:
    if values[low] >= values[high]:
        raise EqknobsError(
            f"config: {section}.{low}: {values[low]} must be below {section}.{high}, which is {values[high]}"
        )


def _check_pitch(labels: dict[str, Any]) -> None:
    _check_range("labels", "fmin", "fmax", labels)
    for key, good in (("fmin", labels["fmin"] < CREPE_HZ[1]), ("fmax", labels["fmax"] > CREPE_HZ[0])):
        if not good:
            raise EqknobsError(
                f"config: labels.{key}: {labels[key]} leaves no pitch that CREPE knows, {CREPE_HZ[0]} to "
                f"{CREPE_HZ[1]} Hz"
            )


def _check_corpus(key: str, data: dict[str, Any]) -> None:
    _check_range(key, "min_seconds", "max_seconds", data)
    if 60 * data["max_minutes"] < 3 * data["min_seconds"]:
        raise EqknobsError(
            f"config: {key}.max_minutes: {data['max_minutes']:g} leaves no room for three clips of {key}.min_seconds, "
            f"{data['min_seconds']:g}"
        )
    needed = "subset" if data["source"] == "librispeech" else "path"
    if data[needed] is None:
        raise EqknobsError(f"config: {key}.{needed}: is null, but {key}.source {data['source']!r} needs it")
    if data.get("speaker_from") == "labels" and not data["labels"]:
        raise EqknobsError(f"config: {key}.labels: is null, but {key}.speaker_from names it; give a CSV")
    if data["split_by"] and not data["labels"]:
        raise EqknobsError(
            f"config: {key}.split_by: needs {key}.labels, a CSV that has this column; give it, or set null"
        )
    check_shares(key, data["splits"])
    if data.get("split_unit") == "sentence" and data["split_by"]:
        raise EqknobsError(
            f"config: {key}.split_by: keeps speakers apart, {key}.split_unit: sentence does not; drop one"
        )
