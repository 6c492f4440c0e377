"""Checks of targets and of what their models can do, as far as a local folder's config.json tells."""

import math
import re
from collections.abc import Mapping
from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.sites import LAYERS, config_file, packaged_facts, read_facts
from eqknobs.plan import parse_target, stage_targets

CODEBOOKS = {
    "mimi": "num_quantizers",
    "dac": "n_codebooks",
    "speechtokenizer": "n_q",
}  # the key of config.json that counts them


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for a target whose model is not defined or has no such site."""
    for target in config["run"]["targets"]:
        name, site = parse_target(target)
        if name not in config["models"]:
            raise EqknobsError(
                f"config: run.targets: {target!r} names the model {name!r}, which is not under models "
                f"({', '.join(sorted(config['models']))})"
            )
        if not site:
            raise EqknobsError(f"config: run.targets: {target!r} must read <model>.<site> or <model>.<site>.<layer>")
        _check_site(config["models"][name], target, site)
    for stage in ("codec", "steering", "importance"):
        if (config.get("activations") or {}).get("frames") and (
            rendered := stage_targets(config, stage, decoding=True)
        ):
            raise EqknobsError(
                f"config: activations.frames: keeps a part of each clip, but {stage} decodes whole clips of "
                f"{rendered[0]}; remove activations.frames or put codecs into a run of their own"
            )


def _check_site(model: dict[str, Any], target: str, site: str) -> None:
    known = LAYERS[model["kind"]]
    place, _, layer = site.partition(".")
    if not (site in known.single or (place in known.stacks and re.fullmatch("[0-9]+", layer))):
        sites = " and ".join([*known.single, *(f"{stack}.<layer>" for stack in known.stacks)])
        raise EqknobsError(f"config: run.targets: {target!r}: the sites of a {model['kind']} are {sites}")
    count = _facts(model).get(known.count)
    if layer and isinstance(count, int) and int(layer) >= count:
        raise EqknobsError(f"config: run.targets: {target!r}: the model has layers 0 to {count - 1}")


def check_codebooks(config: dict[str, Any], key: str, wanted: int | None, targets: list[str]) -> None:
    """Raises EqknobsError, naming the key, where a target's codec has fewer codebooks than wanted."""
    for target in targets:
        name, _ = parse_target(target)
        model = config["models"][name]
        count = _codebooks(model)
        if wanted is not None and count is not None and wanted > count:
            raise EqknobsError(f"config: {key}: {wanted} is more than the {count} codebooks of {name}")


def _codebooks(model: dict[str, Any]) -> int | None:
    """How many a codec has, where its config.json tells."""
    facts = _facts(model)
    if model["kind"] == "encodec":
        return _bandwidth_codebooks(facts)
    count = facts.get(CODEBOOKS.get(model["kind"], ""))
    return count if isinstance(count, int) else None


def _bandwidth_codebooks(facts: Mapping[str, Any]) -> int | None:
    """Those of an EnCodec, whose config.json gives the largest bandwidth (kbit/s) instead; as transformers counts."""
    try:
        frame_rate = math.ceil(facts["sampling_rate"] / math.prod(facts["upsampling_ratios"]))
        bits = math.ceil(math.log2(facts["codebook_size"]))
        return int(1000 * facts["target_bandwidths"][-1] // (frame_rate * bits))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None


def _facts(model: dict[str, Any]) -> Mapping[str, Any]:
    """The model's config.json, where it is in a folder, in the hub's cache, or to be made from a package."""
    if known := packaged_facts(model["path"]):
        return known
    file = config_file(str(model["path"]), model.get("revision"))
    return {} if file is None else read_facts(file)
