"""Checks of `stability` beyond their schema."""

from typing import Any

from eqknobs.plan import check_saes, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets and SAEs that are not there. Nothing to compare is no fault."""
    if config["saes"] and stage_targets(config, "stability"):
        check_saes(config, "stability.saes", config["stability"].get("saes", []))
