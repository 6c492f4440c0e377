"""Checks of `hallucination` beyond their schema, and which layers it opens."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import SPEECH, check_corpus, check_saes, corpus_config, parse_target, sae_home, trained_saes

MOST_POINTS = 24
FORMS = 2  # in which features steer: the paper's and the follow-up's


def hallucination_layers(config: dict[str, Any], model: str) -> dict[int, str]:
    """Layer -> the target, on the SAE's corpus, whose activations and SAE are read."""
    own = config["hallucination"]
    return {layer: sae_home(config, f"{model}.layer.{layer}", own["sae"]) for layer in own["layers"]}


def hallucinating(config: dict[str, Any]) -> list[str]:
    """The models of the stage of which the run opens a layer."""
    own = config.get("hallucination")
    opened = {parse_target(target)[0] for target in config["run"]["targets"]}
    return [name for name in own["models"] if name in opened] if own else []


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for models, layers, SAEs and corpora that are not there or do not fit, and for
    more points than are to be tried."""
    own = config.get("hallucination")
    if not own or not hallucinating(config):
        return
    check_saes(config, "hallucination.sae", [own["sae"]])
    for name in hallucinating(config):
        if config["models"][name]["kind"] != "whisper":
            raise EqknobsError(
                f"config: hallucination.models: {name!r} does not transcribe; name models of kind whisper"
            )
        for layer in own["layers"]:
            target = f"{name}.layer.{layer}"
            if target not in config["run"]["targets"] or own["sae"] not in trained_saes(config, target):
                raise EqknobsError(
                    f"config: hallucination.layers: {target} is no target with the SAE {own['sae']}; add it to "
                    f"run.targets and saes.{own['sae']}.targets"
                )
    _check_corpora(config, own)
    points = len(own["layers"]) * len(own["counts"]) * len(own["alphas"]) * FORMS
    if points > MOST_POINTS:
        raise EqknobsError(
            f"config: hallucination: layers × counts × alphas × {FORMS} forms are {points} points, at most "
            f"{MOST_POINTS} are tried; shorten a list"
        )
    most = config["saes"][own["sae"]]["d_sae"]
    if max(own["counts"]) > most:
        raise EqknobsError(f"config: hallucination.counts: {max(own['counts'])} is more than the SAE has, {most}")


def _check_corpora(config: dict[str, Any], own: dict[str, Any]) -> None:
    for corpus in own["non_speech"]:
        check_corpus(config, "hallucination.non_speech", corpus)
        if corpus == SPEECH:
            raise EqknobsError(f"config: hallucination.non_speech: {SPEECH!r} is the speech itself; name other corpora")
    heard = config["saes"][own["sae"]].get("corpus", SPEECH)
    parts = set(corpus_config(config, heard).get("of", []))
    if not set(own["non_speech"]) < parts:
        raise EqknobsError(
            f"config: hallucination.sae: {own['sae']} hears {heard!r}, which is no union of speech with "
            f"{', '.join(own['non_speech'])}; set saes.{own['sae']}.corpus to one"
        )
