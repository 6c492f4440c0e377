"""Checks of `lm_layers` beyond their schema."""

from pathlib import Path
from typing import Any

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.models.sites import read_facts
from eqknobs.plan import check_corpus, corpus_config

NEEDED = ("centroid", "token")  # heads are ranked by them


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a model that is none, or properties, layers and SAEs that cannot be."""
    own = config.get("lm_layers")
    if not own:
        return
    check_corpus(config, "lm_layers.corpus", own["corpus"])
    for name in own["properties"]:
        if name not in PROPERTIES:
            raise EqknobsError(f"config: lm_layers.properties: {name!r} is not one of {', '.join(PROPERTIES)}")
    if missing := [name for name in NEEDED if name not in own["properties"]]:
        raise EqknobsError(f"config: lm_layers.properties: must hold {missing[0]!r}, by which heads are ranked")
    if 0 not in own["lags"]:
        raise EqknobsError("config: lm_layers.lags: must hold 0, at which shuffled labels are read")
    unit = corpus_config(config, own["corpus"]).get("split_unit", "speaker")
    if "voice" in own["properties"] and unit == "speaker":
        raise EqknobsError(
            "config: lm_layers.properties: 'voice' asks who speaks, but the splits share no speaker; set split_unit: "
            f"sentence for the corpus {own['corpus']}, or remove voice"
        )
    for name in own["models"]:
        _check_model(config, name)
    if own["sae"]["k"] > own["sae"]["d_sae"]:
        raise EqknobsError(f"config: lm_layers.sae.k: {own['sae']['k']} is more than d_sae, {own['sae']['d_sae']}")


def _check_model(config: dict[str, Any], name: str) -> None:
    if name not in config["models"]:
        known = ", ".join(sorted(config["models"]))
        raise EqknobsError(f"config: lm_layers.models: names {name!r}, which is not under models ({known})")
    model = config["models"][name]
    if model["kind"] != "moshi":
        raise EqknobsError(f"config: lm_layers.models: {name} is of kind {model['kind']}, not moshi")
    layers, deepest = (
        read_facts(Path(model["path"]) / "config.json").get("num_layers"),
        max(config["lm_layers"]["sae"]["layers"]),
    )
    if isinstance(layers, int) and deepest >= layers:
        raise EqknobsError(f"config: lm_layers.sae.layers: {name} has layers 0 to {layers - 1}, not {deepest}")
