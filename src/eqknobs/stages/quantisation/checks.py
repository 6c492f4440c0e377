"""Checks of `quantisation` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.checks import check_codebooks
from eqknobs.plan import stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets and codebooks that are not there, for budgets that no mixture of the
    widths has, and for what is to be heard but not made.

    Without importance maps (`importance: null`) there are no plans by maps, and that is no error; a target that
    `importance.targets` leaves out has none either.
    """
    targets = stage_targets(config, "quantisation", decoding=True)
    if not targets:
        return
    own = config["quantisation"]
    check_codebooks(config, "quantisation.codebooks", own["codebooks"], targets)
    low, high = min(own["widths"]), max(own["widths"])
    for budget in own["budgets"]:
        if not low < budget < high:
            raise EqknobsError(
                f"config: quantisation.budgets: {budget:g} does not lie between the widths, {low} and {high} bits; "
                "change one of them"
            )
    for heard, made in (("widths", "widths"), ("budgets", "budgets"), ("parts", "parts")):
        if missing := [value for value in own[f"heard_{heard}"] if value not in own[made]]:
            raise EqknobsError(
                f"config: quantisation.heard_{heard}: {missing[0]} is not under quantisation.{made}; add it there"
            )
