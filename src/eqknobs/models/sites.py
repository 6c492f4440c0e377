"""Which sites a model has, from its config.json alone: nothing here imports torch or loads weights.

For checks and wildcard targets before any work; once loaded, a model's own `sites` are what counts.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.packaged import PACKAGED, packaged


@dataclass(frozen=True)
class Layers:
    """How a kind names its sites: single ones, and `<stack>.<i>` for as many layers as config.json's `count` says."""

    single: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    count: str = ""


# By kind, as `eqknobs.models.KINDS` has them (a test holds them together); a moshi is more than this, see `_moshi`.
LAYERS = {
    "mimi": Layers(("encoder_transformer",), ("encoder_layer",), "num_hidden_layers"),
    "encodec": Layers(("encoder",)),
    "dac": Layers(("encoder",)),
    "speechtokenizer": Layers(("encoder",)),
    "hubert": Layers((), ("layer",), "num_hidden_layers"),
    "whisper": Layers((), ("layer",), "encoder_layers"),
    "moshi": Layers(("embeddings",), ("residual", "heads"), "num_layers"),
}


def sites_of(model: dict[str, Any], fetch: bool = False) -> list[str] | None:
    """Names of all sites of a model, in the network's order; None if that cannot be known.

    model: an entry under `models`. A folder's config.json is read, a hub model's where the hub's cache has it, or with
    `fetch` from the hub. Raises EqknobsError for a folder that holds no Moshi where the kind says so.
    """
    kind, known = model["kind"], LAYERS.get(model["kind"])
    if known is None:
        return None
    if not known.count and kind != "moshi":
        return list(known.single)  # whatever the sizes
    file = config_file(str(model["path"]), model.get("revision"), fetch)
    if kind == "moshi":
        return _moshi(model, file)
    facts = packaged_facts(model["path"]) or (read_facts(file) if file else {})
    layers = facts.get(known.count)
    (stack,) = known.stacks
    return [*known.single, *(f"{stack}.{i}" for i in range(layers))] if isinstance(layers, int) else None


def read_facts(file: Path) -> dict[str, Any]:
    """A config.json; empty if it is not there or is none: what is wrong with it, loading says better."""
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def packaged_facts(path: str) -> Mapping[str, Any]:
    """What is known of the config.json of a packaged model before it is made; empty for other paths."""
    name = packaged(path)
    return PACKAGED[name].facts if name else {}


def config_file(path: str, revision: str | None, fetch: bool = False) -> Path | None:
    """The config.json of a folder, or of a hub model where the hub's cache has it, or with `fetch` from the hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder / "config.json"
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except ValueError:  # no name of the hub's: loading it says so
        return None
    if isinstance(found, str):
        return Path(found)
    if fetch:
        try:
            return Path(hf_hub_download(path, "config.json", revision=revision))
        except Exception:  # whatever the network and the hub's client come up with
            return None
    return None


def _moshi(model: dict[str, Any], file: Path | None) -> list[str] | None:
    # Named, as in `KINDS`: whoever reads a configuration does not depend on a kind's code.
    memory = import_module("eqknobs.models.moshi.memory")
    if shapes := memory.read_shapes({"name": "", **model}):
        heads = shapes.heads
    elif file is not None and isinstance(layers := read_facts(file).get("num_layers"), int):
        heads = (1,) * layers
    else:
        return None
    # a layer that lost all its heads has no site `heads.<layer>`
    layers = [
        f"{kind}.{i}" for i, left in enumerate(heads) for kind in ("residual", "heads") if left or kind != "heads"
    ]
    return ["embeddings", *layers]


def expand_targets(targets: list[str], models: dict[str, Any]) -> list[str]:
    """Targets with each `<model>.<site>.*` replaced by all layers of that site; what is listed twice stays once.

    models: the section of the configuration. Raises EqknobsError, one line: a model that has no such layers, or whose
    layers cannot be known.
    """
    found: list[str] = []
    for target in targets:
        name, _, site = target.partition(".")
        if not site.endswith(".*") or name not in models:
            found.append(target)
            continue
        sites = sites_of({"name": name, **models[name]}, fetch=True)
        if sites is None:
            raise EqknobsError(
                f"config: run.targets: {target!r}: cannot know the layers of {models[name]['path']} from its "
                f"config.json; list them, for instance {target[:-1]}0"
            )
        stem = re.escape(site[:-1])
        layers = [f"{name}.{known}" for known in sites if re.fullmatch(stem + "[0-9]+", known)]
        if not layers:
            raise EqknobsError(
                f"config: run.targets: {target!r}: model {name} has no layers {site}; its sites: {', '.join(sites)}"
            )
        found += layers
    return list(dict.fromkeys(found))
