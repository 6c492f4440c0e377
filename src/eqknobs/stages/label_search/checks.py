"""Checks of `label_search` beyond their schema, and which targets it works on."""

from typing import Any

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.plan import check_saes, stage_saes, stage_targets


def searched_targets(config: dict[str, Any]) -> list[str]:
    """The stage's targets that have SAEs."""
    if not config.get("label_search"):
        return []
    found = stage_targets(config, "label_search")
    return [target for target in found if stage_saes(config, "label_search", target)]


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for SAEs that are not there or a property that is no category."""
    if not config.get("label_search") or not config["saes"]:
        return
    check_saes(config, "label_search.saes", config["label_search"].get("saes", []))
    searched_targets(config)
    categories = [name for name, found in PROPERTIES.items() if found.kind == "category"]
    for name in config["label_search"]["properties"]:
        if name not in categories:
            raise EqknobsError(
                f"config: label_search.properties: {name!r} is no category; choose of {', '.join(categories)}"
            )
