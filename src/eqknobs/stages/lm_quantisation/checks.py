"""Checks of `lm_quantisation` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.speaking.checks import check_speaking


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a model that is not defined or not a moshi, prompts without a folder, models
    whose layers and heads no probe reads, and budgets that are no widths between the others."""
    own = config.get("lm_quantisation")
    if not own:
        return
    check_speaking(config, "lm_quantisation")
    layers = config.get("lm_layers") or {}
    if guided(own) and (missing := sorted(set(own["models"]) - set(layers.get("models", [])))):
        raise EqknobsError(
            f"config: lm_quantisation: its plans need the probes of {missing[0]}'s layers and heads; list it under "
            "lm_layers.models, or take parts: [whole]"
        )
    for budget in own["budgets"]:
        if budget not in own["widths"] or not min(own["widths"]) < budget < max(own["widths"]):
            raise EqknobsError(
                f"config: lm_quantisation.budgets: {budget} is none of the widths that lie between others "
                f"({', '.join(map(str, sorted(own['widths'])))}); change one of them"
            )
    if own["best"]["budget"] not in own["budgets"]:
        raise EqknobsError(
            f"config: lm_quantisation.best.budget: {own['best']['budget']} is not under budgets; add it there"
        )


def guided(own: dict[str, Any]) -> bool:
    """Whether plans are decided by the probes of layers and heads, which the temporal transformer has."""
    return "temporal" in own["parts"]
