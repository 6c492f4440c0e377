"""Checks of the stages that let speech LMs speak (`models` and `prompts` of their sections)."""

from typing import Any

from eqknobs.errors import EqknobsError


def check_speaking(config: dict[str, Any], stage: str) -> None:
    """Raises EqknobsError, one line, for a model that is not defined or not a moshi, or sentences without a folder."""
    check_models(config, stage)
    own = config[stage]
    if own["prompts"]["source"] == "sentences" and not own["prompts"]["sentences"]:
        raise EqknobsError(f"config: {stage}.prompts.sentences: name a folder, or take source: speech")


def check_models(config: dict[str, Any], stage: str) -> None:
    """Raises EqknobsError, one line, for a model that is not defined or not a moshi."""
    own = config[stage]
    for name in own["models"]:
        model = config["models"].get(name)
        if model is None:
            known = ", ".join(sorted(config["models"]))
            raise EqknobsError(f"config: {stage}.models: names {name!r}, which is not under models ({known})")
        if model["kind"] != "moshi":
            raise EqknobsError(f"config: {stage}.models: {name} is of kind {model['kind']}, not moshi")
