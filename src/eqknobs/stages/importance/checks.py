"""Checks of `importance` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.checks import check_codebooks
from eqknobs.plan import check_probed, check_saes, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets, an SAE and codebooks that are not there, and without the
    composition map, whose counts the stage is about."""
    if targets := stage_targets(config, "importance", decoding=True):
        sae = config["importance"]["sae"]
        check_saes(config, "importance.sae", [sae])
        check_probed(config, "importance", [sae])
        check_codebooks(config, "importance.codebooks", config["importance"]["codebooks"], targets)
        if "composition" not in config["importance"]["maps"]:
            raise EqknobsError("config: importance.maps: must hold 'composition', against which all are held; add it")
