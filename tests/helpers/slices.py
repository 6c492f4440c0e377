"""The slices of the configuration that jobs ran with, held against what their scripts say that they take."""

import ast
import importlib.util
import json
import types
import typing
from pathlib import Path
from typing import Any

from helpers import ROOT

ADDED = {"device", "siblings", "content"}  # by `eqknobs.script`, or for Snakemake


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """rule -> the slice of one of its jobs, from Snakemake's records in the folder of a run."""
    records = [
        json.loads(path.read_text()) for path in sorted(folder.glob(".snakemake/metadata/**/*")) if path.is_file()
    ]
    return {record["rule"]: ast.literal_eval(record["params"][0]) for record in records if record["params"]}


def taken(script: str) -> Any:
    """The type of the configuration that a script's `main` takes."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "workflow/scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return typing.get_type_hints(module.main)["cfg"]


def misfits(value: Any, wanted: Any, where: str) -> list[str]:
    """What of a slice is not as it is typed: keys too few or too many, in it and below."""
    if isinstance(wanted, types.UnionType):
        return min((misfits(value, case, where) for case in typing.get_args(wanted)), key=len)
    if not (typing.is_typeddict(wanted) and isinstance(value, dict)):
        return []
    hints, found = typing.get_type_hints(wanted), set(value) | ADDED
    wrong = [f"{where}.{key}: not taken" for key in set(value) - set(hints) - ADDED]
    wrong += [f"{where}.{key}: missing" for key in wanted.__required_keys__ - found]
    return wrong + [
        text for key in set(value) & set(hints) for text in misfits(value[key], hints[key], f"{where}.{key}")
    ]
