"""YAML without its traps: keys that overwrite each other and values that YAML 1.1 reads as something else."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from eqknobs.errors import EqknobsError

_OCTAL = re.compile(r"[-+]?0[0-9_]+")


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML (or JSON) file; None for an empty one.

    Raises EqknobsError, one line that names the file and the line: not readable, not YAML, a key given twice, a key
    that is no text, 1:30 (which YAML takes for 90), 010 (for 8) and dates.
    """
    try:
        text = Path(path).read_text("utf-8")
        return _load(_as_yaml(text), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())  # YAML's own draws the line with a caret under it
        raise EqknobsError(f"{path}: cannot be read as a configuration ({reason})") from error


def parse_yaml(text: str, where: str) -> Any:
    """The plain values of a text, as `read_yaml`. Raises EqknobsError that begins with `where`; yaml.YAMLError."""
    return _load(text, where)


def _as_yaml(text: str) -> str:
    """JSON is YAML, but for its tabs, which stand outside of its strings only."""
    try:
        json.loads(text)
    except ValueError:
        return text
    return text.replace("\t", " ")


def _load(text: str, where: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(node: yaml.Node, where: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, where, seen)
    else:
        lines: dict[str, int] = {}
        for key, value in node.value:
            _check_key(key, where, lines)
            _check(value, where, seen)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _check_key(key: yaml.Node, where: str, lines: dict[str, int]) -> None:
    """Refuse a key that is in `lines` (key -> line) already, and one that YAML does not take for text."""
    if key.tag == "tag:yaml.org,2002:merge":
        return
    name = key.value
    if key.tag != "tag:yaml.org,2002:str" or not isinstance(name, str):
        shown = name if isinstance(name, str) else "a list or mapping"
        kind = key.tag.rpartition(":")[2]
        raise EqknobsError(f"{where}, line {_line(key)}: YAML takes the key {shown} for {kind}; write it in quotes")
    if name in lines:
        raise EqknobsError(
            f"{where}: the key {name!r} stands on line {lines[name]} and again on line {_line(key)}, where it would "
            "replace the first; keep one"
        )
    lines[name] = _line(key)


def _check_scalar(node: yaml.ScalarNode, where: str) -> None:
    kind, text = node.tag.rpartition(":")[2], node.value
    found = None
    if kind in ("int", "float") and ":" in text:
        found = "a number to base 60"
    elif kind == "int" and _OCTAL.fullmatch(text):
        found = "a number to base 8"
    elif kind == "timestamp":
        found = "a date"
    if found:
        raise EqknobsError(
            f"{where}, line {_line(node)}: YAML takes {text} for {found}; write a decimal number, or quote it"
        )
