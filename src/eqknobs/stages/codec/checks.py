"""Checks of `codec` beyond their schema."""

from typing import Any

from eqknobs.models.checks import check_codebooks
from eqknobs.plan import check_saes, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets, SAEs and codebooks that are not there."""
    if targets := stage_targets(config, "codec", decoding=True):
        check_saes(config, "codec.saes", config["codec"].get("saes", []))
        check_codebooks(config, "codec.codebooks", max(config["codec"]["codebooks"]), targets)
