"""Checks of `saes` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import SPEECH, check_corpus, chosen_targets
from eqknobs.schema import mend, validator


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for an SAE that cannot be: a name that reads as a number, a target that the run
    has not, more features on than there are; or a point of its grid that is no SAE of its variant."""
    for name, sae in (config["saes"] or {}).items():
        try:
            float(name)
        except ValueError:
            pass
        else:
            raise EqknobsError(f"config: saes.{name}: the name reads as a number in tables; choose one with letters")
        for target in sae.get("targets", []):
            if "@" in target:
                raise EqknobsError(
                    f"config: saes.{name}.targets: {target!r} names a corpus; it goes into saes.{name}.corpus"
                )
        if chosen_targets(config, f"saes.{name}.targets", sae.get("targets", [])):
            check_corpus(config, f"saes.{name}.corpus", sae.get("corpus", SPEECH))
        _check_grid(f"saes.{name}", sae)


def _check_grid(where: str, sae: dict[str, Any]) -> None:
    grid = sae.get("grid", {})
    schema = validator().schema["$defs"][sae["variant"]]
    for key, values in grid.items():
        for value in values:
            point = {**sae, key: value} if key != "seed" else sae
            for error in validator().evolve(schema=schema).iter_errors(point):
                raise EqknobsError(f"config: {where}.grid.{key}: {mend(error)}")
            if not float(value).is_integer() and key == "seed":
                raise EqknobsError(f"config: {where}.grid.seed: {value} is not of type 'integer'")
    least = min([sae["d_sae"], *grid.get("d_sae", [])])
    for key in ("k", "l0"):
        most = max([sae.get(key, 0), *grid.get(key, [])])
        if most > least:
            raise EqknobsError(f"config: {where}.{key}: {most} is more than d_sae, {least}")
