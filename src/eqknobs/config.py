"""The configuration: its schema, its checks, and the slice of it that each stage depends on.

Snakemake merges the files named by `--configfile` over `config/config.yaml`; nothing outside this module and
the Snakefile ever reads the configuration. A stage gets its own slice as one sorted dictionary of plain JSON
values, so that writing out a default or reordering keys reruns nothing, and editing a value reruns just the
stages whose slice holds it.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import jsonschema
import yaml

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError, counted
from eqknobs.strict_yaml import parse_yaml, read_yaml

PACKAGE = Path(__file__).resolve().parent
SHIPPED = (PACKAGE / "config.schema.json").is_file()  # installed from a wheel, which holds copies (see setup.py)
SCHEMA = (PACKAGE if SHIPPED else PACKAGE.parents[1] / "workflow/schemas") / "config.schema.json"
DEFAULT = (PACKAGE if SHIPPED else PACKAGE.parents[1] / "config") / "config.yaml"
STEERING_VECTORS = ("saes", "codebooks", "binning", "low_bin", "high_bin", "clamp_features")
STEERING_CALIBRATION = (*STEERING_VECTORS, "val_clips", "shift", "tolerance", "alpha_max")
STEERING_RENDER = (*STEERING_VECTORS, "clips", "alphas", "other_alpha")
CREPE_HZ = (32, 2005)  # the lowest and highest pitch it has a class for


def _place(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "the configuration"


def _mend(error: jsonschema.ValidationError) -> str:
    """Say in the user's words what a schema error means."""
    value = error.instance
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(value) - set(known))
        return f"unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
    if error.validator == "required":
        if (set(error.validator_value) - set(value)) & {"kind", "variant"}:
            return f"{error.message}; {DEFAULT.name} has no entry of this name to complete, so give all its keys"
        return f"{error.message}; see config/README.md"
    if error.validator in ("minItems", "minProperties"):
        return "must not be empty"
    if error.validator == "type" and isinstance(value, bool):
        read = "true" if value else "false"
        return f"was read as {read}, as YAML reads on, off, yes and no, not as {error.validator_value}; quote a word"
    if error.validator == "type" and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return f"{value!r} is not of type {error.validator_value}"
        if "e" not in value.lower():
            return f"{value!r} was read as text, not as a number; leave out the quotes"
        return (
            f"{value!r} was read as text, not as a number; YAML wants a dot in an exponent: "
            f"write {float(value)!r} without quotes"
        )
    return error.message


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def settle(config: dict[str, Any], typed: Mapping[str, Any] | None = None) -> None:
    """Make a merged configuration what its writers meant, in place, and check it.

    typed: what `--config` gave. Snakemake reads numbers, true and null inside a mapping or list there as text; where
    the schema wants another type they are read anew. An entry that is null where null is no value of it, such as an
    SAE or an optional key, was dropped by an overlay and goes; whole floats become ints, as 1 and 1.0 mean the same.

    Raises EqknobsError as `validate` does.
    """
    _check_plain(config, "")
    if typed:
        _read_typed(config, typed)
    for error in list(_validator().iter_errors(config)):
        if error.instance is None and error.validator in ("type", "enum") and error.absolute_path:
            *parents, last = error.absolute_path
            parent = _at(config, parents)
            if isinstance(parent, dict):
                parent.pop(last, None)
    for key, value in config.items():
        config[key] = _whole(value)
    validate(config)
    _own_speech(config["data"])


def _own_speech(data: dict[str, Any]) -> None:
    """One spelling of a path; and the labels of the bundled corpus, the default, do not go with other speech."""
    if data["path"]:
        data["path"] = os.path.normpath(data["path"])
    default = read_yaml(DEFAULT)["data"]
    other = data["source"] != default["source"] or data["path"] != os.path.normpath(default["path"] or "")
    if other and data["labels"] == default["labels"]:
        data["labels"] = None


def _at(value: Any, path: Iterable[Any]) -> Any:
    """What stands at a path of keys and indices; None if nothing does."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _read_typed(config: dict[str, Any], typed: Mapping[str, Any]) -> None:
    _type_nulls(config, typed)
    for error in list(_validator().iter_errors(config)):
        text, path = error.instance, list(error.absolute_path)
        if not isinstance(text, str) or error.validator not in ("type", "enum") or _at(typed, path) != text:
            continue
        try:
            value = parse_yaml(text, f"--config {_place(error)}")
        except yaml.YAMLError:
            continue
        if isinstance(value, str):
            with suppress(ValueError):  # 1e-3 is no number to YAML, but is one to Snakemake outside of mappings
                value = float(value)
        wanted = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
        if value in wanted or (error.validator == "type" and any(_validator().is_type(value, t) for t in wanted)):
            _at(config, path[:-1])[path[-1]] = value


def _type_nulls(config: dict[str, Any], typed: Mapping[str, Any]) -> None:
    """ "null" is null, also where text would do; a job's own Snakemake gets it as "None"."""
    for key, value in typed.items():
        if isinstance(value, Mapping):
            if isinstance(config.get(key), dict):
                _type_nulls(config[key], value)
        elif isinstance(value, str) and value in ("", "~", "null", "Null", "NULL", "None"):
            config[key] = None


def _check_plain(value: Any, where: str) -> None:
    """Raise EqknobsError for what no schema error would name well: keys that are not text, dates, .nan and .inf."""
    here = where or "the configuration"
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise EqknobsError(f"config: {here}: the key {key!r} is not text; write it in quotes")
            _check_plain(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise EqknobsError(f"config: {here}: {value} is not a finite number")
    elif not isinstance(value, (str, int, float, NoneType)):
        raise EqknobsError(f"config: {here}: {value!s} was read as a {type(value).__name__}; write it in quotes")


def validate(config: dict[str, Any]) -> None:
    """Check a merged configuration before any work starts.

    Raises EqknobsError, one line, for an unknown key, a wrong type, an impossible value, values that contradict each
    other, or a target, SAE or model that is not defined.
    """
    _check_plain(config, "")
    errors = sorted(_validator().iter_errors(config), key=lambda e: (_place(e), e.message))
    if errors:
        raise EqknobsError(f"config: {_place(errors[0])}: {_mend(errors[0])}")
    for target in config["run"]["targets"]:
        _check_target(config, target)
    for name, sae in (config["saes"] or {}).items():
        _check_sae(f"saes.{name}", sae)
    _check_named_saes(config)
    _check_relations(config)


def _check_target(config: dict[str, Any], target: str) -> None:
    model, site = parse_target(target)
    if model not in config["models"]:
        raise EqknobsError(
            f"config: run.targets: {target!r} names the model {model!r}, which is not under models "
            f"({', '.join(sorted(config['models']))})"
        )
    if not site:
        raise EqknobsError(f"config: run.targets: {target!r} must read <model>.<site> or <model>.<site>.<layer>")
    if config["models"][model]["kind"] == "moshi" and not re.fullmatch(r"(residual|heads)\.[0-9]+", site):
        raise EqknobsError(
            f"config: run.targets: {target!r}: the sites of a moshi are residual.<layer> and heads.<layer>"
        )
    if not config["saes"] and decodes(config, target):
        raise EqknobsError(
            f"config: saes: is null, but {target!r} is a codec, whose stages need SAEs; name at least one"
        )


def _check_sae(where: str, sae: dict[str, Any]) -> None:
    """Every point of an SAE's grid must be an SAE of its variant, with no more features on than there are."""
    grid = sae.get("grid", {})
    schema = _validator().schema["$defs"][sae["variant"]]
    for key, values in grid.items():
        for value in values:
            point = {**sae, key: value} if key != "seed" else sae
            for error in _validator().evolve(schema=schema).iter_errors(point):
                raise EqknobsError(f"config: {where}.grid.{key}: {_mend(error)}")
            if not float(value).is_integer() and key == "seed":
                raise EqknobsError(f"config: {where}.grid.seed: {value} is not of type 'integer'")
    least = min([sae["d_sae"], *grid.get("d_sae", [])])
    for key in ("k", "l0"):
        most = max([sae.get(key, 0), *grid.get(key, [])])
        if most > least:
            raise EqknobsError(f"config: {where}.{key}: {most} is more than d_sae, {least}")


def _check_named_saes(config: dict[str, Any]) -> None:
    if not config["saes"]:
        return
    for key, names in (
        ("steering.saes", config["steering"]["saes"]),
        ("importance.sae", [config["importance"]["sae"]]),
        ("probes.reference", [config["probes"]["reference"]] if config["probes"]["reference"] else []),
    ):
        if missing := sorted(set(names) - set(config["saes"])):
            raise EqknobsError(
                f"config: {key}: names {missing[0]!r}, which is not under saes ({', '.join(sorted(config['saes']))}); "
                f"name one of these in {key}, or define {missing[0]}"
            )


def _check_properties(config: dict[str, Any]) -> None:
    """Properties must be registered, and not ask who speaks of speakers that train never holds."""
    for name in config["probes"]["properties"]:
        if name not in PROPERTIES:
            raise EqknobsError(f"config: probes.properties: {name!r} is not one of {', '.join(PROPERTIES)}")
        if not PROPERTIES[name].of_speakers and config["data"].get("split_unit", "speaker") == "speaker":
            raise EqknobsError(
                f"config: probes.properties: {name!r} asks who speaks, but the splits share no speaker; "
                f"set data.split_unit: sentence, or remove {name}"
            )
    if config["data"].get("split_unit") == "sentence" and config["data"]["split_by"]:
        raise EqknobsError("config: data.split_by: keeps speakers apart, data.split_unit: sentence does not; drop one")


def _check_relations(config: dict[str, Any]) -> None:
    """Values that are possible each, but not together."""
    _check_properties(config)
    if "centroid" not in config["probes"]["properties"]:
        raise EqknobsError("config: probes.properties: must hold 'centroid', which steering and importance need")
    last = config["probes"]["bins"] - 1
    for key in ("low_bin", "high_bin"):
        if config["steering"][key] > last:
            raise EqknobsError(f"config: steering.{key}: {config['steering'][key]} is above the last bin, {last}")
    for section, low, high in (
        ("labels", "fmin", "fmax"),
        ("data", "min_seconds", "max_seconds"),
        ("steering", "low_bin", "high_bin"),
    ):
        below, above = config[section][low], config[section][high]
        if below >= above:
            raise EqknobsError(f"config: {section}.{low}: {below} must be below {section}.{high}, which is {above}")
    for key, good in (
        ("fmin", config["labels"]["fmin"] < CREPE_HZ[1]),
        ("fmax", config["labels"]["fmax"] > CREPE_HZ[0]),
    ):
        if not good:
            raise EqknobsError(
                f"config: labels.{key}: {config['labels'][key]} leaves no pitch that CREPE knows, "
                f"{CREPE_HZ[0]} to {CREPE_HZ[1]} Hz"
            )
    data = config["data"]
    if 60 * data["max_minutes"] < 3 * data["min_seconds"]:
        raise EqknobsError(
            f"config: data.max_minutes: {data['max_minutes']:g} leaves no room for three clips of data.min_seconds, "
            f"{data['min_seconds']:g}"
        )
    needed = "subset" if data["source"] == "librispeech" else "path"
    if data[needed] is None:
        raise EqknobsError(f"config: data.{needed}: is null, but data.source {data['source']!r} needs it")
    if data.get("speaker_from") == "labels" and not data["labels"]:
        raise EqknobsError("config: data.labels: is null, but data.speaker_from names it; give a CSV")
    if data["split_by"] and not data["labels"]:
        raise EqknobsError("config: data.split_by: needs data.labels, a CSV that has this column; give it, or set null")
    if abs(sum(data["splits"].values()) - 1) > 1e-6:
        raise EqknobsError("config: data.splits: the three shares must add up to 1")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A configuration over another as Snakemake merges them: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        mappings = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if mappings else value
    return merged


def read_config(path: str | Path) -> dict[str, Any]:
    """A configuration file, merged over `config/config.yaml` and settled, as the workflow sees it.

    Raises EqknobsError: no such file, not YAML, a key given twice, and whatever `validate` refuses.
    """
    over = read_yaml(path)
    if not isinstance(over, dict):
        raise EqknobsError(f"{path}: holds no configuration; see config/README.md")
    config = merge(read_yaml(DEFAULT), over)
    settle(config)
    return config


def describe(config: dict[str, Any], list_files: Callable[[str], list[str]] | None = None) -> str:
    """One line on what a run will work on: its name, data, limits of the draw, targets with their models, and SAEs.

    list_files: names what there is in a folder of speech, to be counted.
    """
    data, run = config["data"], config["run"]
    if "codec_training" in config:
        return f"Run {run['name']}: trains a codec on {', '.join(config['codec_training']['data'])}"
    if "speech_lm_training" in config:
        return f"Run {run['name']}: trains a speech LM on {config['speech_lm_training']['speech']}"
    where = f"LibriSpeech {data['subset']}" if data["source"] == "librispeech" else f"{data['source']} {data['path']}"
    if list_files is not None and data["source"] == "folder":
        sounds = [file for file in list_files(data["path"]) if not file.lower().endswith(".txt")]
        where += f" ({counted(len(sounds), 'sound file')})"
    models = {parse_target(target)[0] for target in run["targets"]}
    paths = ", ".join(f"{name} = {config['models'][name]['path']}" for name in sorted(models))
    return (
        f"Run {run['name']}: {where}, up to {counted(data['max_utterances'], 'clip')} and {data['max_minutes']:g} min; "
        f"{', '.join(run['targets'])} ({paths}); SAEs: {', '.join(sorted(config['saes'] or {})) or 'none'}"
    )


def parse_target(target: str) -> tuple[str, str]:
    """Split "tiny-mimi.encoder_layer.2" into the model "tiny-mimi" and the site "encoder_layer.2"."""
    model, _, site = target.partition(".")
    return model, site


def _whole(value: Any) -> Any:
    """A copy of plain values in which whole floats are ints, as 1 and 1.0 mean the same."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def plain(value: Any) -> Any:
    """A copy of plain JSON values with sorted keys; whole floats become ints."""
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value)}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else _whole(value)


def model_config(config: dict[str, Any], target: str) -> dict[str, Any]:
    """What `eqknobs.models.load_model` takes, for the model of a target; the device is added when the job runs."""
    name, _ = parse_target(target)
    return {"name": name, **config["models"][name]}


def decodes(config: dict[str, Any], target: str) -> bool:
    """Whether the target's model turns activations back into sound (a codec), so that it can be steered."""
    return config["models"][parse_target(target)[0]]["kind"] in ("mimi", "encodec", "dac")


def reference_saes(config: dict[str, Any]) -> list[str]:
    """The SAEs that may give `pca_l0` and `random_topk` their sizes: the one named by `probes.reference`, else all."""
    reference = config["probes"]["reference"]
    return [reference] if reference and config["saes"] else sorted(config["saes"] or {})


def bundled(path: str | Path) -> bool:
    """Whether a file or folder is one that comes with this project, below resources/."""
    return Path(path).resolve().is_relative_to(Path("resources").resolve())


def bundled_speech(config: dict[str, Any]) -> bool:
    """Whether the speech is the synthetic corpus that comes with this project."""
    data = config["data"]
    return data["source"] != "librispeech" and bool(data.get("path")) and bundled(data["path"])


def stage_config(config: dict[str, Any], stage: str, /, **wildcards: str) -> dict[str, Any]:
    """The slice of the configuration that one job depends on, as sorted plain JSON values.

    `stage` is the name of a rule; `wildcards` are the job's. The device is none of it: where something was computed
    does not decide what it is (`eqknobs.script` adds it). Raises KeyError for a stage that is not one.
    """
    seed = config["run"]["seed"]
    target = wildcards.get("target", "")
    steering, probes = config["steering"], config["probes"]

    def model() -> dict[str, Any]:
        return {"model": model_config(config, target), "site": parse_target(target)[1]}

    def probed() -> dict[str, Any]:
        category = PROPERTIES[wildcards["property"]].kind == "category"
        keys = ("l2", "epochs") if category else ("l2", "epochs", "bins", "lags")
        return {key: probes[key] for key in keys} | {"property": wildcards["property"], "seed": seed}

    slices = {
        "codec_training": lambda: {**config["codec_training"], "seed": seed},
        "speech_lm_training": lambda: (
            {k: v for k, v in config["speech_lm_training"].items() if k != "scores"} | {"seed": seed}
        ),
        "speech_lm_scores": lambda: {k: config["speech_lm_training"][k] for k in ("speech", "codec", "scores")},
        "manifest": lambda: {"data": config["data"], "seed": seed},
        "activations": model,
        "labels": lambda: config["labels"],
        "sae": lambda: {
            "sae": {k: v for k, v in config["saes"][wildcards["sae"]].items() if k != "grid"},
            "seed": int(wildcards["seed"]),
        },
        "sae_grid": lambda: {"sae": config["saes"][wildcards["sae"]], "seed": seed},
        "sae_scores": lambda: {"seed": seed},
        "probes": probed,
        "sae_probes": probed,
        "originals": lambda: {"judges": config["judges"]},
        "codec_renders": lambda: {**model(), **config["codec"]},
        "steering_calibration": lambda: {
            **model(),
            **{key: steering[key] for key in STEERING_CALIBRATION},
            "seed": seed,
        },
        "steering_renders": lambda: {
            **model(),
            **{key: steering[key] for key in STEERING_RENDER},
            "other_alpha": {k: v for k, v in steering["other_alpha"].items() if k in probes["properties"]},
            "report_clips": config["report"]["clips"],
            "seed": seed,
        },
        "importance_renders": lambda: {**model(), **config["importance"], "seed": seed},
        "judgements": lambda: {"judges": config["judges"]},
        "tables": lambda: {
            **config["tables"],
            "seed": seed,
            "targets": config["run"]["targets"],
            "properties": probes["properties"],
            "models": {parse_target(t)[0]: config["models"][parse_target(t)[0]] for t in config["run"]["targets"]},
            "steering_codebooks": steering["codebooks"],
            "saes": sorted(config["saes"] or {}),
            "bundled_speech": bundled_speech(config),
        },
        "report": lambda: {"config": {key: value for key, value in config.items() if key != "hardware"}},
    }
    return plain(slices[stage]())
