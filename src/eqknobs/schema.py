"""The schema of the configuration, put together from the `settings.yaml` that lie with what they configure.

Each maps keys of the configuration to JSON Schema (draft 2020-12), with a few words of our own so that little is
written twice: what has `properties` is an object that takes no other key, and every key must be there but those marked
`optional`; `open` leaves it open. `switch: kind` with `cases` is a mapping whose key `kind` says which case it is. Of
a list marked `unordered` (true or `descending`), and of a `path`, every spelling means the same (`settled`). A key
that a merged mapping brings along is taken out by `false`. The keys below one marked `brief` are described elsewhere.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from eqknobs.errors import EqknobsError

PACKAGE = Path(__file__).resolve().parent
# The one list of what can be configured, in the order of the table in config/README.md.
PARTS = (
    ".",
    "corpus",
    "models",
    "sae",
    "stages/saes",
    "stages/stability",
    "stages/domains",
    "stages/probes",
    "stages/phones",
    "stages/label_search",
    "stages/erasing",
    "stages/features",
    "stages/hallucination",
    "stages/codec",
    "stages/steering",
    "stages/importance",
    "stages/quantisation",
    "stages/accent",
    "stages/speech_lm",
    "stages/lm_layers",
    "stages/lm_pruning",
    "stages/lm_quantisation",
    "stages/lm_recipe",
    "stages/lm_steering",
    "sound",
    "report",
    "stages/codec_training",
    "stages/speech_lm_training",
)


@cache
def schema() -> dict[str, Any]:
    """The whole schema, in plain JSON Schema but for `unordered` and `path`, which validators pass over."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for part in PARTS:
        loader = yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader
        found = yaml.load((PACKAGE / part / "settings.yaml").read_text("utf-8"), loader)
        definitions |= found.pop("$defs", {})
        properties |= found
    return _plain({"properties": properties}) | {"$defs": {name: _plain(value) for name, value in definitions.items()}}


def _plain(value: Any) -> Any:
    """A part of the schema with our own words written out."""
    if not isinstance(value, dict):
        return value
    value = {key: item for key, item in value.items() if key not in ("optional", "open", "switch", "cases")} | (
        _cases(value) if "switch" in value else {}
    )
    if "properties" in value and "switch" not in value and "allOf" not in value:
        known = {key: item for key, item in value["properties"].items() if item is not False}
        value |= {
            "additionalProperties": False,
            "required": [key for key, item in known.items() if not item.get("optional")],
            "properties": {key: _plain(item) for key, item in known.items()},
        }
    elif isinstance(value.get("additionalProperties"), dict):
        value["additionalProperties"] = _plain(value["additionalProperties"])
    if "properties" in value or "additionalProperties" in value:
        value.setdefault("type", "object")
    return value


def _cases(value: dict[str, Any]) -> dict[str, Any]:
    key = value["switch"]
    cases = [
        {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": _plain(case)}
        for name, case in value["cases"].items()
    ]
    return {"required": [key], "properties": {key: {"enum": list(value["cases"])}}, "allOf": cases}


@cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema())


def place(error: jsonschema.ValidationError) -> str:
    """The key that a schema error is about, in dots."""
    return ".".join(str(part) for part in error.absolute_path) or "the configuration"


def mend(error: jsonschema.ValidationError) -> str:
    """Say in the user's words what a schema error means."""
    value = error.instance
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(value) - set(known))
        return f"unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
    if error.validator == "required":
        if (set(error.validator_value) - set(value)) & {"kind", "variant"}:
            return f"{error.message}; config.yaml has no entry of this name to complete, so give all its keys"
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


def resolved(part: dict[str, Any], value: Any = None) -> dict[str, Any]:
    """A part of the schema that stands for itself: references followed, and of cases the one that `value` is."""
    if "$ref" in part:
        part = schema()["$defs"][part["$ref"].removeprefix("#/$defs/")]
    for case in part.get("allOf", []):
        ((key, wanted),) = case["if"]["properties"].items()
        if isinstance(value, dict) and value.get(key) == wanted["const"]:
            return resolved(case["then"])
    return part


def settled(value: Any, part: dict[str, Any] | None = None) -> Any:
    """A copy of a valid configuration in which what means the same reads the same.

    Paths are normalised, and lists whose order means nothing are sorted, numbers in names by their size. Raises
    EqknobsError where two keys are the same path.
    """
    part = resolved(schema() if part is None else part, value)
    if isinstance(value, dict):
        paths = part.get("propertyNames", {}).get("path")
        found = {}
        for key, item in value.items():
            below = part.get("properties", {}).get(key) or part.get("additionalProperties")
            name = os.path.normpath(key) if paths else key
            if name in found:
                raise EqknobsError(f"config: {key} stands there twice, the other time as another spelling; keep one")
            found[name] = settled(item, below) if isinstance(below, dict) else item
        return found
    if isinstance(value, list) and part.get("unordered"):
        return sorted(value, key=_by_size, reverse=part["unordered"] == "descending")
    return os.path.normpath(value) if part.get("path") and isinstance(value, str) and value else value


def _by_size(value: Any) -> Any:
    """Sort key: numbers by size, text with the numbers in it by theirs."""
    if not isinstance(value, str):
        return value
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"([0-9]+)", value))]


def described() -> Iterator[tuple[str, str]]:
    """(key, what it means) of every key that has a description, in the order of the files.

    What only some cases of a mapping have begins with their names.
    """
    yield from _described("", schema())


def _described(where: str, part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    part = resolved(part)
    if part.get("brief"):
        yield where, part["description"]
        return
    if "allOf" in part:
        yield from _described_cases(where, part)
        return
    if "description" in part:
        yield where, part["description"]
    for key, below in part.get("properties", {}).items():
        for name, text in _described(f"{where}.{key}".lstrip("."), below):
            yield name, f"optional: {text}" if key not in part["required"] and name.endswith(key) else text
    if isinstance(below := part.get("additionalProperties"), dict):
        yield from _described(f"{where}.<name>", below)


def _described_cases(where: str, part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    ((key, kinds),) = part["properties"].items()
    yield f"{where}.{key}", part["description"]
    found: dict[tuple[str, str], list[str]] = {}
    for kind, case in zip(kinds["enum"], part["allOf"], strict=True):
        for row in _described(where, case["then"]):
            found.setdefault(row, []).append(kind)
    for (name, text), having in found.items():
        yield name, text if len(having) == len(kinds["enum"]) else f"{', '.join(having)}: {text}"
