"""Checks of `steering` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.checks import check_codebooks
from eqknobs.plan import check_probed, check_saes, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets, SAEs, codebooks and classes that are not there."""
    targets = stage_targets(config, "steering", decoding=True)
    if not targets:
        return
    steering = config["steering"]
    check_saes(config, "steering.saes", steering["saes"])
    check_probed(config, "steering", steering["saes"])
    check_codebooks(config, "steering.codebooks", steering["codebooks"], targets)
    last = config["probes"]["bins"] - 1
    for key in ("low_bin", "high_bin"):
        if steering[key] > last:
            raise EqknobsError(f"config: steering.{key}: {steering[key]} is above the last bin, {last}")
    if steering["low_bin"] >= steering["high_bin"]:
        raise EqknobsError(
            f"config: steering.low_bin: {steering['low_bin']} must be below steering.high_bin, which is "
            f"{steering['high_bin']}"
        )
