"""Checks of `erasing` beyond their schema, and which targets it works on."""

from typing import Any

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.plan import (
    SPEECH,
    check_corpus,
    check_saes,
    chosen_targets,
    corpus_config,
    corpus_of,
    stage_saes,
)

VOWELS = "vowels"


def erased_targets(config: dict[str, Any]) -> list[str]:
    """The stage's targets that have SAEs, each on every corpus that has tasks."""
    if not config.get("erasing"):
        return []
    own = config["erasing"]
    found = chosen_targets(config, "erasing.targets", own.get("targets", []), sorted(own["tasks"]))
    return [target for target in found if corpus_of(target) in own["tasks"] and stage_saes(config, "erasing", target)]


def vowels_told(config: dict[str, Any], target: str) -> bool:
    """Whether vowels are told apart in a target."""
    return VOWELS in config["erasing"]["tasks"][corpus_of(target)]


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for SAEs or corpora that are not there, tasks that are none, missing phones."""
    if not config.get("erasing") or not config["saes"]:
        return
    own = config["erasing"]
    check_saes(config, "erasing.saes", own.get("saes", []))
    categories = [name for name, found in PROPERTIES.items() if found.kind == "category" and found.level == "clip"]
    for corpus, tasks in own["tasks"].items():
        check_corpus(config, "erasing.tasks", corpus)
        for task in tasks:
            if task not in (*categories, VOWELS):
                known = ", ".join([*categories, VOWELS])
                raise EqknobsError(f"config: erasing.tasks.{corpus}: {task!r} is no task; choose of {known}")
    for target in erased_targets(config):
        corpus = corpus_of(target)
        parts = corpus_config(config, corpus).get("of", [corpus])
        if vowels_told(config, target) and not any("phones" in corpus_config(config, part) for part in parts):
            key = "data" if corpus == SPEECH else f"corpora.{corpus}"
            raise EqknobsError(
                f"config: erasing.tasks.{corpus}: vowels need phones; give {key}.phones (of a union: of one of its "
                "parts), or leave vowels out"
            )
