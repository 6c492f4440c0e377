"""Checks of `probes` beyond their schema."""

from typing import Any

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.plan import check_saes, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets and SAEs that are not there."""
    if stage_targets(config, "probes"):
        check_saes(config, "probes.saes", config["probes"].get("saes", []))
        if config["probes"]["reference"] and config["saes"]:
            check_saes(config, "probes.reference", [config["probes"]["reference"]])
        _check_properties(config)


def _check_properties(config: dict[str, Any]) -> None:
    """Properties must be registered, and not ask who speaks of speakers that train never holds."""
    for name in config["probes"]["properties"]:
        if name not in PROPERTIES:
            raise EqknobsError(f"config: probes.properties: {name!r} is not one of {', '.join(PROPERTIES)}")
        if not PROPERTIES[name].of_speakers and config["data"].get("split_unit", "speaker") == "speaker":
            raise EqknobsError(
                f"config: probes.properties: {name!r} asks who speaks, but the splits share no speaker; "
                f"set data.split_unit: sentence, or remove {name}"
            )
