"""Which findings an overview shows, and how those of a stage stand side by side."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

VERDICTS = ("positive", "negative", "undecided", "measured")
DECIDED, MOST, LEAST = 6, 8, 5  # at most so many decided findings, and findings in all; fewer than LEAST are filled up


def weight(line: dict[str, Any]) -> float:
    """Evidence behind a headline: |value| in half-widths of its interval; 0 where it has none."""
    if "value" not in line:
        return 0.0
    half = (line["high"] - line["low"]) / 2
    return abs(line["value"]) / half if half > 0 else float("inf")


def strongest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The five to eight findings of an overview, each with `alike`: in how many more conditions its claim fares so.

    lines: headlines of all targets, each with its `target`. Decided ones come first, by `weight`, for and against in
    turn, six at most; of a claim (a row of a target's matrix) only its strongest condition. Then measured ones, every
    stage's first before any stage's second, until there are eight; undecided ones, by weight, only where fewer than
    five were found.
    """
    lines = list(lines)
    sides = [_claims([line for line in lines if line["verdict"] == verdict]) for verdict in ("positive", "negative")]
    sides.sort(key=lambda side: -weight(side[0]) if side else 0.0)
    decided = [side[i] for i in range(DECIDED) for side in sides if i < len(side)][:DECIDED]
    measured = [line | {"alike": 0} for line in lines if line["verdict"] == "measured"]
    turn: Counter[str] = Counter()
    turns = []
    for line in measured:
        turns.append(turn[line["stage"]])
        turn[line["stage"]] += 1
    order = sorted(range(len(measured)), key=turns.__getitem__)
    found = decided + [measured[i] for i in order][: MOST - len(decided)]
    if len(found) < LEAST:
        found += _claims([line for line in lines if line["verdict"] == "undecided"])[: LEAST - len(found)]
    return found


def _claims(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The strongest line of each claim, by weight."""
    lines = sorted(lines, key=weight, reverse=True)
    claims: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        claims.setdefault((line["target"], line["stage"], line.get("row", line["text"])), []).append(line)
    return [same[0] | {"alike": len(same) - 1} for same in claims.values()]


def matrix(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """{columns, rows, sentences}: rows are {name, cells}, a cell a headline or None.

    Headlines without a row and column, or for a cell that is taken, are left as sentences; so are all where they
    would fill no more than one cell.
    """
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    sentences = []
    for line in lines:
        at = (line.get("row"), line.get("column"))
        if at[0] is None or at[1] is None or at in cells or "value" not in line:
            sentences.append(line)
        else:
            cells[at[0], at[1]] = line
    if len(cells) < 2:
        return {"columns": [], "rows": [], "sentences": lines}
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = [
        {"name": row, "cells": [cells.get((row, column)) for column in columns]}
        for row in dict.fromkeys(row for row, _ in cells)
    ]
    return {"columns": columns, "rows": rows, "sentences": sentences}


def tally(lines: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many findings have each verdict, those that none has left out."""
    counted = Counter(line["verdict"] for line in lines)
    return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}
