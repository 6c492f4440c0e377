"""Checks of `accent` beyond their schema."""

from typing import Any

from eqknobs.corpus.checks import check_shares
from eqknobs.errors import EqknobsError
from eqknobs.plan import DECODING, SPEECH


def accent_models(config: dict[str, Any]) -> list[str]:
    """The models that the stage reads, sorted."""
    return sorted(config["accent"]["codecs"]) if config.get("accent") else []


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for models, corpora and labels that are not there or do not fit."""
    accent = config.get("accent")
    if not accent:
        return
    _check_codecs(config, accent)
    _check_tasks(accent)
    known = [SPEECH, *config.get("corpora", {})]
    if accent["corpus"] is not None and accent["corpus"] not in known:
        raise EqknobsError(f"config: accent.corpus: {accent['corpus']!r} is not one of {', '.join(known)}")
    check_shares("accent.synthesis", accent["synthesis"]["splits"])


def _check_codecs(config: dict[str, Any], accent: dict[str, Any]) -> None:
    for name, codec in accent["codecs"].items():
        if name not in config["models"]:
            raise EqknobsError(f"config: accent.codecs: {name!r} is not under models; define it there")
        decodes = config["models"][name]["kind"] in DECODING
        if not decodes and ("codebooks" in codec or "grid" in codec):
            raise EqknobsError(f"config: accent.codecs.{name}: is no codec, so it has no codebooks; leave them out")
        if "grid" in codec and codec["grid"] not in codec.get("codebooks", [codec["grid"]]):
            raise EqknobsError(f"config: accent.codecs.{name}.grid: {codec['grid']} is not among its codebooks")


def _check_tasks(accent: dict[str, Any]) -> None:
    said = accent["synthesis"]["accents"] if accent["corpus"] is None else None
    for name, task in accent["tasks"].items():
        if both := sorted(set(task["zero"]) & set(task["one"])):
            raise EqknobsError(f"config: accent.tasks.{name}: {both[0]!r} is on both sides; take it off one")
        unsaid = [label for label in (*task["zero"], *task["one"]) if said is not None and label not in said]
        if unsaid:
            raise EqknobsError(
                f"config: accent.tasks.{name}: {unsaid[0]!r} is not among accent.synthesis.accents; add it there"
            )
