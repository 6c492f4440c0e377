"""Checks of `phones` beyond their schema, and which targets it works on."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import SPEECH, check_saes, corpus_config, corpus_of, stage_saes, stage_targets


def phone_targets(config: dict[str, Any]) -> list[str]:
    """The stage's targets that have SAEs."""
    if not config.get("phones"):
        return []
    return [target for target in stage_targets(config, "phones") if stage_saes(config, "phones", target)]


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for SAEs that are not there, or a corpus without phones."""
    if not config.get("phones") or not config["saes"]:
        return
    check_saes(config, "phones.saes", config["phones"].get("saes", []))
    for target in phone_targets(config):
        corpus = corpus_of(target)
        data = corpus_config(config, corpus)
        if not any("phones" in corpus_config(config, part) for part in data.get("of", [corpus])):
            key = "data" if corpus == SPEECH else f"corpora.{corpus}"
            raise EqknobsError(
                f"config: phones: {target} hears a corpus of which no phones are known; give {key}.phones "
                "(of a union: of one of its parts), or leave the target out of phones.targets"
            )
