"""Checks of `speech_lm` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a model that is not defined or does not speak."""
    for name in (config.get("speech_lm") or {}).get("models", []):
        if name not in config["models"]:
            raise EqknobsError(
                f"config: speech_lm.models: names {name!r}, which is not under models "
                f"({', '.join(sorted(config['models']))})"
            )
        if config["models"][name]["kind"] != "moshi":
            raise EqknobsError(
                f"config: speech_lm.models: {name} is of kind {config['models'][name]['kind']}, not moshi"
            )
