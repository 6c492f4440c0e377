"""Checks of `lm_pruning` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.speaking.checks import check_speaking


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a model that is not defined or not a moshi, prompts without a folder, or
    orders that need probes of heads which no stage makes."""
    own = config.get("lm_pruning")
    if not own:
        return
    check_speaking(config, "lm_pruning")
    _check_probed(config, own)


def _check_probed(config: dict[str, Any], own: dict[str, Any]) -> None:
    if not needs_probes(own):
        return
    layers = config.get("lm_layers") or {}
    if missing := sorted(set(own["models"]) - set(layers.get("models", []))):
        raise EqknobsError(
            f"config: lm_pruning: its orders need the probes of {missing[0]}'s heads; list it under lm_layers.models, "
            "or leave out acoustic_first, acoustic_last, random_layers, guided and inverted"
        )


def needs_probes(own: dict[str, Any]) -> bool:
    """Whether an order is decided by the probes of heads."""
    removal, weights = own["removal"] or {"order": ""}, own["weights"] or {"orders": []}
    orders = {*own["heads"]["orders"], *weights["orders"], removal["order"]}
    return bool(orders & {"acoustic_first", "acoustic_last", "random_layers", "guided", "inverted"})
