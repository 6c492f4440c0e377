"""The configuration: merged, settled and checked before any work.

Snakemake merges the files named by `--configfile` over `config/config.yaml`; only the Snakefile, `rules/` and
`eqknobs.plan` read it then. A stage gets its own slice, which its rule file holds, as one sorted dictionary of plain
JSON values, so that writing out a default or reordering keys reruns nothing, and editing a value reruns just the stages
whose slice holds it. The schema lies with what it configures (`eqknobs.schema`), and so do the checks beyond it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

import eqknobs.corpus.checks
import eqknobs.models.checks
import eqknobs.stages.accent.checks
import eqknobs.stages.codec.checks
import eqknobs.stages.domains.checks
import eqknobs.stages.erasing.checks
import eqknobs.stages.features.checks
import eqknobs.stages.hallucination.checks
import eqknobs.stages.importance.checks
import eqknobs.stages.label_search.checks
import eqknobs.stages.lm_layers.checks
import eqknobs.stages.lm_pruning.checks
import eqknobs.stages.lm_quantisation.checks
import eqknobs.stages.lm_recipe.checks
import eqknobs.stages.lm_steering.checks
import eqknobs.stages.phones.checks
import eqknobs.stages.probes.checks
import eqknobs.stages.quantisation.checks
import eqknobs.stages.saes.checks
import eqknobs.stages.speech_lm.checks
import eqknobs.stages.stability.checks
import eqknobs.stages.steering.checks
from eqknobs.errors import EqknobsError, counted
from eqknobs.models.sites import expand_targets
from eqknobs.plan import parse_target
from eqknobs.schema import mend, place, settled, validator
from eqknobs.strict_yaml import parse_yaml, read_yaml

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "config.yaml"  # a wheel holds a copy (see setup.py)
DEFAULT = SHIPPED if SHIPPED.is_file() else PACKAGE.parents[1] / "config/config.yaml"
# The one list of checks; each passes over what a run has switched off or has no target for.
CHECKS: tuple[Callable[[dict[str, Any]], None], ...] = (
    eqknobs.models.checks.check,
    eqknobs.corpus.checks.check,
    eqknobs.stages.saes.checks.check,
    eqknobs.stages.stability.checks.check,
    eqknobs.stages.domains.checks.check,
    eqknobs.stages.probes.checks.check,
    eqknobs.stages.phones.checks.check,
    eqknobs.stages.label_search.checks.check,
    eqknobs.stages.erasing.checks.check,
    eqknobs.stages.accent.checks.check,
    eqknobs.stages.codec.checks.check,
    eqknobs.stages.steering.checks.check,
    eqknobs.stages.importance.checks.check,
    eqknobs.stages.features.checks.check,
    eqknobs.stages.hallucination.checks.check,
    eqknobs.stages.quantisation.checks.check,
    eqknobs.stages.speech_lm.checks.check,
    eqknobs.stages.lm_layers.checks.check,
    eqknobs.stages.lm_pruning.checks.check,
    eqknobs.stages.lm_quantisation.checks.check,
    eqknobs.stages.lm_recipe.checks.check,
    eqknobs.stages.lm_steering.checks.check,
)


def settle(config: dict[str, Any], typed: Mapping[str, Any] | None = None) -> None:
    """Make a merged configuration what its writers meant, in place, and check it.

    A target `<model>.<site>.*` becomes all layers that the model has there (`eqknobs.models.sites`).

    typed: what `--config` gave. Snakemake reads numbers, true and null inside a mapping or list there as text; where
    the schema wants another type they are read anew. An entry that is null where null is no value of it, such as an
    SAE or an optional key, was dropped by an overlay and goes; whole floats become ints, as 1 and 1.0 mean the same;
    paths and lists whose order means nothing get one spelling.

    Raises EqknobsError as `validate` does.
    """
    _check_plain(config, "")
    if typed:
        _read_typed(config, typed)
    for error in list(validator().iter_errors(config)):
        if error.instance is None and error.validator in ("type", "enum") and error.absolute_path:
            *parents, last = error.absolute_path
            parent = _at(config, parents)
            if isinstance(parent, dict):
                parent.pop(last, None)
    for key, value in config.items():
        config[key] = _whole(value)
    _check_schema(config)
    config["run"]["targets"] = expand_targets(config["run"]["targets"], config["models"])
    validate(config)
    config.update(settled(config))
    _own_speech(config["data"])
    for corpus in (config["data"], *config.get("corpora", {}).values()):
        if "subset" in corpus:
            corpus["path" if corpus["source"] == "librispeech" else "subset"] = None


def _own_speech(data: dict[str, Any]) -> None:
    """The labels of the bundled corpus, the default, do not go with other speech."""
    default = settled(read_yaml(DEFAULT))["data"]
    if (data["source"], data["path"]) != (default["source"], default["path"]) and data["labels"] == default["labels"]:
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
    for error in list(validator().iter_errors(config)):
        text, path = error.instance, list(error.absolute_path)
        if not isinstance(text, str) or error.validator not in ("type", "enum") or _at(typed, path) != text:
            continue
        try:
            value = parse_yaml(text, f"--config {place(error)}")
        except yaml.YAMLError:
            continue
        if isinstance(value, str):
            with suppress(ValueError):  # 1e-3 is no number to YAML, but is one to Snakemake outside of mappings
                value = float(value)
        wanted = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
        if value in wanted or (error.validator == "type" and any(validator().is_type(value, t) for t in wanted)):
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
    _check_schema(config)
    for check in CHECKS:
        check(config)


def _check_schema(config: dict[str, Any]) -> None:
    _check_plain(config, "")
    errors = sorted(validator().iter_errors(config), key=lambda e: (place(e), e.message))
    if errors:
        raise EqknobsError(f"config: {place(errors[0])}: {mend(errors[0])}")


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
