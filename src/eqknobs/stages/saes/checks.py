"""Checks of `saes` beyond their schema."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import (
    SPEECH,
    check_corpus,
    check_saes,
    chosen_targets,
    parse_target,
    sae_home,
    stage_saes,
    stage_targets,
)
from eqknobs.schema import mend, validator

TRANSCRIBING = "whisper"  # the kind of model that goes on to words


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for an SAE that cannot be: a name that reads as a number, a target that the run
    has not, more features on than there are; or a point of its grid that is no SAE of its variant; or for `splicing`
    where nothing can be spliced."""
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
    if config.get("splicing"):
        _check_splicing(config)


def spliced_saes(config: dict[str, Any]) -> dict[str, list[str]]:
    """Target, on the corpus that its SAEs hear -> the SAEs that `splicing` puts into its model; models that do not
    transcribe have none."""
    found: dict[str, list[str]] = {}
    for target in stage_targets(config, "splicing"):
        if config["models"][parse_target(target)[0]]["kind"] == TRANSCRIBING:
            for name in stage_saes(config, "splicing", target):
                found.setdefault(sae_home(config, target, name), []).append(name)
    return found


def _check_splicing(config: dict[str, Any]) -> None:
    check_saes(config, "splicing.saes", config["splicing"].get("saes", []))
    for corpus in config["splicing"]["non_speech"]:
        check_corpus(config, "splicing.non_speech", corpus)
        if corpus == SPEECH:
            raise EqknobsError(f"config: splicing.non_speech: {SPEECH!r} is the speech itself; name other corpora")
    for target in stage_targets(config, "splicing") if "targets" in config["splicing"] else ():
        if config["models"][parse_target(target)[0]]["kind"] != TRANSCRIBING:
            raise EqknobsError(f"config: splicing.targets: {target!r} is of no model that transcribes; leave it out")
    reference = config["splicing"].get("reference")
    if reference is not None and config["models"].get(reference, {}).get("kind") != TRANSCRIBING:
        raise EqknobsError(
            f"config: splicing.reference: {reference!r} is no model of kind {TRANSCRIBING} under models; add it there"
        )
    if "targets" not in config["splicing"] and not spliced_saes(config):
        raise EqknobsError(f"config: splicing: no target of kind {TRANSCRIBING} has an SAE; set splicing: null")


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
