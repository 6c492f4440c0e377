"""Checks of `probes` beyond their schema."""

from typing import Any

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.plan import SPEECH, check_saes, corpora_used, corpus_config, stage_targets


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets and SAEs that are not there."""
    if stage_targets(config, "probes"):
        check_saes(config, "probes.saes", config["probes"].get("saes", []))
        if config["probes"]["reference"] and config["saes"]:
            check_saes(config, "probes.reference", [config["probes"]["reference"]])
        _check_properties(config)


def _check_properties(config: dict[str, Any]) -> None:
    """Properties must be registered, and not ask who speaks of speakers that train never holds."""
    heard = corpora_used(config, stage_targets(config, "probes"))
    drawn = {("data" if c == SPEECH else f"corpora.{c}"): corpus_config(config, c) for c in heard}
    apart = [key for key, data in drawn.items() if "of" not in data and data.get("split_unit", "speaker") == "speaker"]
    for name in config["probes"]["properties"]:
        if name not in PROPERTIES:
            raise EqknobsError(f"config: probes.properties: {name!r} is not one of {', '.join(PROPERTIES)}")
        if apart and not PROPERTIES[name].of_speakers:
            raise EqknobsError(
                f"config: probes.properties: {name!r} asks who speaks, but the splits of {apart[0]} share no speaker; "
                f"set {apart[0]}.split_unit: sentence, or remove {name}"
            )
