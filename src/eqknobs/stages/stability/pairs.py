"""Which SAEs the stage compares, from the configuration alone."""

from typing import Any, NamedTuple

from eqknobs.plan import corpus_of, parse_target, sae_home, stage_saes, stage_targets


class Pair(NamedTuple):
    """Two SAEs whose features are compared: `a`'s are looked for among `b`'s."""

    kind: str  # "seeds", "layers" or "models"
    sae: str
    target_a: str
    seed_a: int
    target_b: str
    seed_b: int


def compared_targets(config: dict[str, Any]) -> list[str]:
    """The targets that the stage works on: those of its targets that have SAEs."""
    if not config.get("stability"):
        return []
    return [target for target in stage_targets(config, "stability") if stage_saes(config, "stability", target)]


def pairs_of(config: dict[str, Any], target: str) -> list[Pair]:
    """The pairs whose first SAE is of a target; directed: of two seeds either is looked for in the other."""
    wanted, seeds = config["stability"]["pairs"], sorted(config["sae_seeds"])
    first, found = seeds[0], []
    for sae in stage_saes(config, "stability", target):
        if "seeds" in wanted:
            found += [Pair("seeds", sae, target, a, target, b) for a in seeds for b in seeds if a != b]
        for kind in ("layers", "models"):
            if kind in wanted:
                others = _next_layer(config, target) if kind == "layers" else _other_models(config, target)
                trained = [other for other in others if sae in stage_saes(config, "stability", other)]
                found += [Pair(kind, sae, target, first, other, first) for other in trained]
    return found


def _stack(target: str) -> tuple[str, str, str, str]:
    """(model, stack, layer, corpus) of a target; layer "" where the site is no layer."""
    model, site = parse_target(target)
    stack, _, layer = site.rpartition(".")
    return (model, stack, layer, corpus_of(target)) if layer.isdigit() else (model, site, "", corpus_of(target))


def _next_layer(config: dict[str, Any], target: str) -> list[str]:
    model, stack, layer, corpus = _stack(target)
    if not layer:
        return []
    above = [other for other in compared_targets(config) if _stack(other)[:2] == (model, stack)]
    above = [other for other in above if _stack(other)[3] == corpus and int(_stack(other)[2]) > int(layer)]
    return sorted(above, key=lambda other: int(_stack(other)[2]))[:1]


def _other_models(config: dict[str, Any], target: str) -> list[str]:
    model, _, layer, corpus = _stack(target)
    return [
        other
        for other in compared_targets(config)
        if _stack(other)[0] != model and _stack(other)[2:] == (layer, corpus) and layer
    ]


def sae_folder(config: dict[str, Any], target: str, sae: str, seed: int) -> str:
    """Where an SAE lies below `saes/` of a run."""
    return f"{sae_home(config, target, sae)}/{sae}/seed{seed}"
