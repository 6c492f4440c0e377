"""Which phone is said when: a CSV, or a folder of Praat's TextGrids (as forced aligners write them)."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from eqknobs.errors import EqknobsError
from eqknobs.io import read_text_csv

COLUMNS = ("id", "start", "end", "phone")
TIERS = ("phones", "phone", "phonemes", "segments")  # names of the tier that is read; else the only one of intervals
SILENCES = ("", "sp", "spn", "pau", "<p:>", "<sil>", "silence")  # aligners' names of what is called `sil` here
Intervals = dict[str, pd.DataFrame]


def read_phones(path: str | Path) -> Intervals:
    """Phones by clip id: DataFrame start, end (seconds from the clip's begin, in order) and phone; silences are `sil`.

    path: a CSV with the columns id, start, end, phone, or a folder with `<id>.TextGrid` anywhere below. Raises
    EqknobsError for what is neither, a missing column, times that are no numbers or overlap, and broken TextGrids.
    """
    path = Path(path)
    if not path.exists():
        raise EqknobsError(f"data.phones: no file {path}; give a CSV (id, start, end, phone) or a folder of TextGrids")
    if path.is_dir():
        found = {file.stem: read_textgrid(file) for file in sorted(path.rglob("*.TextGrid"))}
        if not found:
            raise EqknobsError(f"data.phones: no .TextGrid in {path}; give a CSV (id, start, end, phone) or TextGrids")
    else:
        table = read_text_csv(path)
        if missing := [name for name in COLUMNS if name not in table]:
            raise EqknobsError(f"{path}: no column {missing[0]}; a CSV of phones has {', '.join(COLUMNS)}")
        found = {str(key): rows[["start", "end", "phone"]] for key, rows in table.groupby("id", sort=False)}
    return {key: _checked(rows, key, path) for key, rows in found.items()}


def _checked(rows: pd.DataFrame, key: str, path: Path) -> pd.DataFrame:
    try:
        times = {name: rows[name].astype(float).to_numpy() for name in ("start", "end")}
    except ValueError:
        raise EqknobsError(f"{path}: {key} has a time that is no number; give seconds") from None
    start, end = times["start"], times["end"]
    if not (end > start).all() or (start[1:] < end[:-1] - 1e-6).any():
        raise EqknobsError(f"{path}: intervals of {key} are empty, overlap or are not in order; mend them")
    phones = ["sil" if phone.strip().lower() in SILENCES else phone.strip() for phone in rows["phone"]]
    return pd.DataFrame({**times, "phone": phones})


def read_textgrid(path: str | Path) -> pd.DataFrame:
    """start, end, phone of the tier of phones in a TextGrid, long or short form, UTF-8 or UTF-16."""
    raw = Path(path).read_bytes()
    text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
    # Both forms are the same values in the same order: quoted texts, and numbers that stand alone.
    bare = r'"(?:[^"]|"")*"|(?<![\w.\[])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.\]])'
    values = [value[1:-1].replace('""', '"') if value[0] == '"' else float(value) for value in re.findall(bare, text)]
    try:
        tiers = dict(_tiers(values))
    except (IndexError, TypeError, ValueError):
        raise EqknobsError(f"{path}: is no whole TextGrid; write it again from Praat or the aligner") from None
    name = next((name for name in tiers if name.lower() in TIERS), next(iter(tiers)) if len(tiers) == 1 else None)
    if name is None:
        raise EqknobsError(f"{path}: no tier of intervals called phones, only {', '.join(tiers) or 'none'}; rename it")
    return pd.DataFrame(tiers[name], columns=["start", "end", "phone"])


def _tiers(values: list) -> list[tuple[str, list[tuple]]]:
    """Name and intervals of each tier of intervals, from the values of a TextGrid in their order."""
    if values[:2] != ["ooTextFile", "TextGrid"]:
        raise ValueError
    count, at = int(values[4]), 5  # after the types and the times of the whole
    found = []
    for _ in range(count):
        kind, name, size = values[at], values[at + 1], int(values[at + 4])
        width = 3 if kind == "IntervalTier" else 2
        rows = [tuple(values[place : place + width]) for place in range(at + 5, at + 5 + width * size, width)]
        at += 5 + width * size
        if at > len(values):
            raise IndexError
        if kind == "IntervalTier":
            found.append((name, rows))
    return found


def phone_codes(phones: Intervals, ids: list[str], times: list[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """(codes int16 [frames] of each clip, −1 where no phone is known; their names, sorted).

    ids: of the clips; times: of the middles of each clip's frames, seconds [frames]. A frame has the phone that is said
    in its middle.
    """
    names = sorted({phone for id in ids if id in phones for phone in phones[id]["phone"]})
    place = {name: code for code, name in enumerate(names)}
    codes = []
    for id, middle in zip(ids, times, strict=True):
        code = np.full(len(middle), -1, np.int16)
        if id in phones and len(rows := phones[id]):
            row = np.searchsorted(rows["start"].to_numpy(), middle, side="right") - 1
            inside = (row >= 0) & (middle < rows["end"].to_numpy()[row])
            code[inside] = rows["phone"].map(place).to_numpy()[row[inside]]
        codes.append(code)
    return codes, names
