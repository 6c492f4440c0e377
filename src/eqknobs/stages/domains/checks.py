"""Checks of `domains` beyond their schema, and which targets it works on."""

from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.plan import check_corpus, check_saes, on_corpus, stage_saes, stage_targets


def domain_targets(config: dict[str, Any]) -> list[str]:
    """The stage's targets that have SAEs, each on the union of the domains."""
    if not config.get("domains"):
        return []
    found = [target for target in stage_targets(config, "domains") if stage_saes(config, "domains", target)]
    return [on_corpus(target, config["domains"]["corpus"]) for target in found]


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for targets and SAEs that are not there, or a corpus that is no union of two."""
    if not config.get("domains") or not config["saes"]:
        return
    check_saes(config, "domains.saes", config["domains"].get("saes", []))
    if not domain_targets(config):
        return
    corpus = config["domains"]["corpus"]
    check_corpus(config, "domains.corpus", corpus)
    if len(config.get("corpora", {}).get(corpus, {}).get("of", [])) < 2:
        raise EqknobsError(
            f"config: domains.corpus: {corpus!r} is no union of two corpora or more; give it `source: union` and `of`"
        )
