"""Checks of `lm_recipe` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.speaking.checks import check_models


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a model that is not defined or not a moshi, or heads that no stage orders."""
    own = config.get("lm_recipe")
    if not own:
        return
    check_models(config, "lm_recipe")
    pruning = config.get("lm_pruning") or {"models": [], "heads": {"orders": [], "seeds": 0}}
    if missing := sorted(set(own["models"]) - set(pruning["models"])):
        raise EqknobsError(
            f"config: lm_recipe: takes heads out in the orders of lm_pruning; list {missing[0]} under "
            "lm_pruning.models, or set lm_recipe: null"
        )
    if missing := [order for order in own["orders"] if order not in pruning["heads"]["orders"]]:
        raise EqknobsError(f"config: lm_recipe.orders: {missing[0]} is not under lm_pruning.heads.orders; add it there")
    if own["seeds"] > pruning["heads"]["seeds"]:
        raise EqknobsError(
            f"config: lm_recipe.seeds: {own['seeds']} drawn orders, but lm_pruning.heads.seeds makes "
            f"{pruning['heads']['seeds']}; raise that"
        )
