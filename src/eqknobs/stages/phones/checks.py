"""Checks of `phones` beyond their schema, and which targets it works on."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import check_saes, stage_saes, stage_targets


def named_saes(config: dict[str, Any], target: str) -> list[str]:
    """The SAEs whose features the stage names: those of its own list, or all, that are probed too."""
    return [sae for sae in stage_saes(config, "phones", target) if sae in stage_saes(config, "probes", target)]


def phone_targets(config: dict[str, Any]) -> list[str]:
    """The stage's targets: those that have SAEs and are probed."""
    if not config.get("phones") or not config["probes"]:
        return []
    probed = stage_targets(config, "probes")
    return [target for target in stage_targets(config, "phones") if target in probed and named_saes(config, target)]


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for SAEs that are not there, or if phones are not probed."""
    if not config.get("phones") or not config["saes"]:
        return
    check_saes(config, "phones.saes", config["phones"].get("saes", []))
    if not config["probes"] or "phone" not in config["probes"]["properties"]:
        raise EqknobsError("config: phones: needs the property phone in probes.properties; add it, or set phones: null")
