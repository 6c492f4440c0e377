"""Checks of `lm_steering` beyond their schema."""

from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.sites import read_facts
from eqknobs.plan import corpus_config
from eqknobs.speaking.checks import check_speaking


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a model that is no moshi or not opened by `lm_layers`, layers that are not
    there or have no SAE, random directions beside none, shifts that are none, voices that no split shares."""
    own = config.get("lm_steering")
    if not own:
        return
    check_speaking(config, "lm_steering")
    layers = config.get("lm_layers") or {}
    if missing := sorted(set(own["models"]) - set(layers.get("models", []))):
        raise EqknobsError(
            f"config: lm_steering: needs the caches of {missing[0]}'s layers; list it under lm_layers.models"
        )
    for name in own["models"]:
        count = read_facts(Path(config["models"][name]["path"]) / "config.json").get("num_layers")
        if isinstance(count, int) and max(own["layers"]) >= count:
            raise EqknobsError(
                f"config: lm_steering.layers: {name} has layers 0 to {count - 1}, not {max(own['layers'])}"
            )
    if needs_saes(own) and (missing := sorted(set(own["layers"]) - set(layers["sae"]["layers"]))):
        raise EqknobsError(
            f"config: lm_steering.layers: layer {missing[0]} has no SAE; add it to lm_layers.sae.layers, or leave "
            "sae_probe and sae_feature out of lm_steering.directions"
        )
    if missing := sorted(set(own["random"]["beside"]) - set(own["directions"])):
        raise EqknobsError(f"config: lm_steering.random.beside: {missing[0]!r} is not under lm_steering.directions")
    if not own["shifts"] or 0 in own["shifts"].values():
        raise EqknobsError("config: lm_steering.shifts: name a property with a shift that is not 0")
    corpus = corpus_config(config, layers["corpus"])
    if "voice" in own["shifts"] and corpus.get("split_unit", "speaker") == "speaker":
        raise EqknobsError(
            "config: lm_steering.shifts: voice needs speakers who are in train and test; set split_unit: sentence for "
            f"the corpus {layers['corpus']}, or remove voice"
        )


def needs_saes(own: dict[str, Any]) -> bool:
    """Whether a direction is an SAE's."""
    return bool({"sae_probe", "sae_feature"} & set(own["directions"]))
