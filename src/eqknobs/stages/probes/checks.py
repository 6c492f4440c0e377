"""Checks of `probes` beyond their schema."""

from typing import Any

from eqknobs.plan import check_saes, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets and SAEs that are not there."""
    if stage_targets(config, "probes"):
        check_saes(config, "probes.saes", config["probes"].get("saes", []))
