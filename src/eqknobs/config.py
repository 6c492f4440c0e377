"""The configuration: its schema, its checks, and the slice of it that each stage depends on.

Snakemake merges the files named by `--configfile` over `config/config.yaml`; nothing outside this module and
the Snakefile ever reads the configuration. A stage gets its own slice as one sorted dictionary of plain JSON
values, so that writing out a default or reordering keys reruns nothing, and editing a value reruns just the
stages whose slice holds it.
"""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from eqknobs.errors import EqknobsError

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"
DEFAULT = ROOT / "config" / "config.yaml"
STEERING_VECTORS = ("saes", "codebooks", "binning", "low_bin", "high_bin", "clamp_features")
STEERING_CALIBRATION = (*STEERING_VECTORS, "val_clips", "shift", "tolerance", "alpha_max")
STEERING_RENDER = (*STEERING_VECTORS, "clips", "alphas", "other_alpha")


def _place(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "the configuration"


def _mend(error: jsonschema.ValidationError) -> str:
    """Say in the user's words what a schema error means."""
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known))
        return f"unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
    if error.validator == "required":
        return f"{error.message}; see config/README.md"
    if error.validator == "type" and isinstance(error.instance, str):
        try:
            float(error.instance)
        except ValueError:
            return f"{error.instance!r} is not of type {error.validator_value}"
        return (
            f"{error.instance!r} was read as text, not as a number; YAML wants a dot in an exponent: "
            f"write {float(error.instance)!r} without quotes"
        )
    return error.message


def validate(config: dict[str, Any]) -> None:
    """Check a merged configuration before any work starts.

    Raises EqknobsError, one line, for an unknown key, a wrong type, an impossible value or a target, SAE or model
    that is not defined.
    """
    schema = json.loads(SCHEMA.read_text())
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(config), key=lambda e: (_place(e), e.message))
    if errors:
        raise EqknobsError(f"config: {_place(errors[0])}: {_mend(errors[0])}")
    for target in config["run"]["targets"]:
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
    if config["saes"]:
        for key in ("steering", "importance"):
            wanted = config[key]["saes"] if key == "steering" else [config[key]["sae"]]
            missing = sorted(set(wanted) - set(config["saes"]))
            if missing:
                raise EqknobsError(f"config: {key} names the SAE {missing[0]!r}, which is not under saes")
    if not {"centroid"} <= set(config["probes"]["properties"]):
        raise EqknobsError("config: probes.properties: must hold 'centroid', which steering and importance need")
    last = config["probes"]["bins"] - 1
    for key in ("low_bin", "high_bin"):
        if config["steering"][key] > last:
            raise EqknobsError(f"config: steering.{key}: {config['steering'][key]} is above the last bin, {last}")
    data = config["data"]
    needed = "subset" if data["source"] == "librispeech" else "path"
    if data[needed] is None:
        raise EqknobsError(f"config: data.{needed}: is null, but data.source {data['source']!r} needs it")
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
    """A configuration file, merged over `config/config.yaml` and checked, as the workflow sees it.

    Raises EqknobsError: no such file, not YAML, and whatever `validate` refuses.
    """
    try:
        over = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EqknobsError(f"{path}: cannot be read as a configuration ({error})") from error
    if not isinstance(over, dict):
        raise EqknobsError(f"{path}: holds no configuration; see config/README.md")
    config = merge(yaml.safe_load(DEFAULT.read_text()), over)
    validate(config)
    return config


def parse_target(target: str) -> tuple[str, str]:
    """Split "tiny-mimi.encoder_layer.2" into the model "tiny-mimi" and the site "encoder_layer.2"."""
    model, _, site = target.partition(".")
    return model, site


def plain(value: Any) -> Any:
    """A copy of plain JSON values with sorted keys; whole floats become ints, as 1 and 1.0 mean the same."""
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def model_config(config: dict[str, Any], target: str) -> dict[str, Any]:
    """What `eqknobs.models.load_model` takes, for the model of a target."""
    name, _ = parse_target(target)
    return {"name": name, "device": config["hardware"]["device"], **config["models"][name]}


def decodes(config: dict[str, Any], target: str) -> bool:
    """Whether the target's model turns activations back into sound (a codec), so that it can be steered."""
    return config["models"][parse_target(target)[0]]["kind"] in ("mimi", "encodec", "dac")


def stage_config(config: dict[str, Any], stage: str, /, **wildcards: str) -> dict[str, Any]:
    """The slice of the configuration that one job depends on, as sorted plain JSON values.

    `stage` is the name of a rule; `wildcards` are the job's. Raises KeyError for a stage that is not one.
    """
    seed, device = config["run"]["seed"], config["hardware"]["device"]
    target = wildcards.get("target", "")
    steering, probes = config["steering"], config["probes"]

    def model() -> dict[str, Any]:
        return {"model": model_config(config, target), "site": parse_target(target)[1]}

    slices = {
        "codec_training": lambda: {**config["codec_training"], "seed": seed, "device": device},
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
            "device": device,
        },
        "sae_grid": lambda: {"sae": config["saes"][wildcards["sae"]], "seed": seed, "device": device},
        "sae_scores": lambda: {"seed": seed},
        "probes": lambda: {**probes, "property": wildcards["property"], "seed": seed, "device": device},
        "originals": lambda: {"judges": config["judges"], "device": device},
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
        "judgements": lambda: {"judges": config["judges"], "device": device},
        "tables": lambda: {
            **config["tables"],
            "seed": seed,
            "targets": config["run"]["targets"],
            "properties": probes["properties"],
            "models": {parse_target(t)[0]: config["models"][parse_target(t)[0]] for t in config["run"]["targets"]},
            "steering_codebooks": steering["codebooks"],
            "saes": bool(config["saes"]),
        },
        "report": lambda: {"config": config},
    }
    return plain(slices[stage]())
