"""What a folder of speech says about itself: its files, who speaks in them, and the labels CSV laid beside it."""

import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eqknobs.corpus.properties import COLUMNS
from eqknobs.errors import EqknobsError, counted
from eqknobs.io import read_text_csv

AUDIO_SUFFIXES = {".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf"}
UNSUPPORTED_SUFFIXES = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr"}
TEXT_ENDS = (".trans.txt", ".normalized.txt", ".original.txt", "speakers.txt")  # what is read beside them, lower case
KEYS = ("id", "path", "speaker")  # of the rows of a labels CSV
SAID = ("speaker", "sex", "accent", "text")  # its columns that go into the manifest
ALSO = tuple(name for name in COLUMNS if name not in SAID)  # and those that only probes ask for
UNMATCHED_SHARE = 0.2  # of the rows of a labels CSV
LAYOUTS = {
    "LibriSpeech": "LibriSpeech (<speaker>/<chapter>/<speaker>-<chapter>-*)",
    "LibriTTS": "LibriTTS (<speaker>/<chapter>/<speaker>_<chapter>_*)",
    "VCTK": "VCTK (pNNN/pNNN_*)",
    "Common Voice": "Common Voice (common_voice_*)",
    "folder": "one folder a speaker",
}


def nfc(text: str) -> str:
    """File systems and spreadsheets disagree on how "é" is composed."""
    return unicodedata.normalize("NFC", text)


def shown(path: Path) -> str:
    """Path relative to the working directory where possible, so that a manifest can move with its folder.

    Bytes of the name that are not UTF-8 are written as `\\udc..`: such a path can be read, not opened.
    """
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    text = absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else absolute.as_posix()
    return text.encode("utf-8", "backslashreplace").decode()


def few(names: Iterable[str]) -> str:
    """The first three of some names, for a line of text."""
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


@dataclass
class Clip:
    """A file of the corpus and what is known of it before it is opened."""

    file: Path
    name: str  # path below the corpus folder
    stem: str
    layout: str  # a key of LAYOUTS; "": none that is known
    speaker: str  # "": not known
    id: str = ""


# --- files and layouts ---


def walk(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """All files below a folder, sorted, links that lead nowhere among them; and why folders were left out.

    Links to folders are followed, after the real folders; no folder is read twice, whatever links lead to it.
    """
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    seen: dict[tuple[int, int], Path] = {}
    real, linked = [folder], list[Path]()
    while real or linked:
        here = real.pop() if real else linked.pop(0)
        try:
            state = here.stat()
            taken = seen.setdefault((state.st_dev, state.st_ino), here)
            if taken != here:
                left_out[here] = f"same folder as {shown(taken)}"
                continue
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            left_out[here] = "folder cannot be read"
            continue
        for entry in entries:
            try:
                kind = (linked if entry.is_symlink() else real) if entry.is_dir() else files
            except OSError:  # a link to itself
                kind = files
            kind.append(Path(entry.path))
    return sorted(files), left_out


def layout_of(path: Path, folder: Path) -> tuple[str, str]:
    """(key of LAYOUTS, speaker) of a file by its own name and those of the folders above it.

    ("", "") where there are folders in folders and the names fit no layout: which of them is the speaker, nobody can
    tell.
    """
    parent, above = (nfc(p.name) for p in path.absolute().parents[:2])
    stem = nfc(path.stem)
    if stem.startswith(f"{above}-{parent}-"):
        return "LibriSpeech", above
    if stem.startswith(f"{above}_{parent}_"):
        return "LibriTTS", above
    if re.fullmatch(r"p\d{3}|s5", parent) and stem.startswith(f"{parent}_"):
        return "VCTK", parent
    if stem.startswith("common_voice_"):  # one folder for all: who speaks stands in its tables only
        return "Common Voice", ""
    if len(path.relative_to(folder).parts) <= 2:
        return "folder", parent
    return "", ""


def find_clips(files: list[Path], folder: Path, speaker_from: str | None) -> list[Clip]:
    """The sound files among `files`, with the speakers that their layout or `data.speaker_from` names."""
    clips = []
    for path in files:
        if path.suffix.lower() in AUDIO_SUFFIXES | UNSUPPORTED_SUFFIXES:
            layout, speaker = layout_of(path, folder)
            parts = [nfc(part) for part in path.relative_to(folder).parts]
            if speaker_from == "parent":
                speaker = nfc(path.absolute().parent.name)
            elif speaker_from == "grandparent":
                speaker = parts[-3] if len(parts) > 2 else ""
            elif speaker_from == "top":
                speaker = parts[0] if len(parts) > 1 else ""
            elif speaker_from == "labels":
                speaker = ""
            clips.append(Clip(path, "/".join(parts), nfc(path.stem), layout, speaker))
    _doubt_vctk(clips, speaker_from)
    return clips


def _doubt_vctk(clips: list[Clip], speaker_from: str | None) -> None:
    """`p001/p001_*` below several folders may as well be the first part of several readers."""
    above: dict[str, set[Path]] = {}
    for clip in clips:
        if clip.layout == "VCTK":
            above.setdefault(clip.file.parent.name, set()).add(clip.file.parent.parent)
    for clip in clips:
        if clip.layout == "VCTK" and len(above[clip.file.parent.name]) > 1:
            clip.layout = ""
            clip.speaker = clip.speaker if speaker_from else ""


def librispeech_sexes(folder: Path, files: list[Path] | None = None) -> dict[str, str]:
    """Sex by speaker from SPEAKERS.TXT in, below or right above `folder`; files: all that `folder` holds, if known."""
    below = walk(folder)[0] if files is None else files
    found = [path for path in below if path.name.upper() == "SPEAKERS.TXT"]
    for file in [*found, folder.absolute().parent / "SPEAKERS.TXT"]:
        if file.is_file():
            rows = [line.split("|") for line in _lines(file) if line[:1] != ";"]
            return {nfc(row[0].strip()): row[1].strip() for row in rows if len(row) > 1}
    return {}


class Transcripts:
    """Texts that lie beside the sound: `*.trans.txt` (LibriSpeech), `<file>.normalized.txt` (LibriTTS)."""

    def __init__(self) -> None:
        self.folders: dict[Path, dict[str, str]] = {}

    def text(self, clip: Clip) -> str:
        """What is said in a clip, on one line; "" where nothing tells."""
        folder = clip.file.parent
        if clip.layout == "LibriTTS":
            for kind in ("normalized", "original"):
                if (file := folder / f"{clip.file.stem}.{kind}.txt").is_file():
                    return one_line(" ".join(_lines(file)))
        if clip.layout not in ("LibriSpeech", "LibriTTS"):
            return ""
        if folder not in self.folders:
            lines = [line for file in sorted(folder.glob("*.trans.txt")) for line in _lines(file)]
            rows = (line.partition(" ") for line in lines)
            self.folders[folder] = {nfc(key): one_line(text) for key, _, text in rows}
        return self.folders[folder].get(clip.stem, "")


def _lines(file: Path) -> list[str]:
    try:
        return re.split(r"\r\n?|\n", file.read_text("utf-8", "replace"))
    except OSError as error:
        raise EqknobsError(f"{file}: cannot be read ({error.strerror}); mend or remove it") from error


def one_line(text: str) -> str:
    """Line ends, tabs and control characters, with the blanks around them, become one blank."""
    return re.sub(r" *[\x00-\x1f\x7f-\x9f\u2028\u2029]+ *", " ", text).strip()


# --- labels CSV ---


@dataclass
class Labels:
    """The rows of a labels CSV by their key; the key is a cell of the column `key` (id, path or speaker)."""

    path: str
    key: str
    rows: dict[str, dict[str, str]]

    def fits(self, clips: list[Clip]) -> bool:
        """Whether any row means any of the clips, or several of them."""
        exact = self._index(clips)
        bare = {form.lstrip("0") for form in exact}
        plain = [self._plain(key) for key in self.rows if key]
        return any(self._places(key, exact) for key in self.rows) or any(
            number.isdecimal() and number.lstrip("0") in bare for number in plain
        )

    def match(self, clips: list[Clip]) -> list[dict[str, str]]:
        """For each clip what its row says, {} where it has none; prints what was matched.

        A key counts as written, else without `./`, backslashes and the file's suffix, else as a path from the working
        directory, else, where just one name fits, without leading zeros (spreadsheets drop them). Raises EqknobsError
        for a key that fits several files, for two rows of one file, and where more than a fifth of the rows fit nothing
        while there are files without one.
        """
        rows_of: dict[int, str] = {}
        exact = self._index(clips)
        missing = []
        for key in self.rows:
            if not self._take(key, self._places(key, exact), rows_of, clips):
                missing.append(key)
        bare: dict[str, set[int]] = {}
        for form, places in exact.items():
            if not places & rows_of.keys():
                bare.setdefault(form.lstrip("0"), set()).update(places)
        unmatched = []
        for key in missing:
            number = self._plain(key)
            places = bare.get(number.lstrip("0"), set()) if number.isdecimal() else set()
            names = {clips[place].speaker if self.key == "speaker" else clips[place].name for place in places}
            if len(names) != 1 or not self._take(key, places, rows_of, clips):
                unmatched.append(key)
        self._report(clips, rows_of, unmatched, len(missing) - len(unmatched))
        return [self.rows[rows_of[place]] if place in rows_of else {} for place in range(len(clips))]

    def _index(self, clips: list[Clip]) -> dict[str, set[int]]:
        """Clips by each form of their key; files of an unsupported format only where no other has the same form."""
        index: dict[str, set[int]] = {}
        order = sorted(range(len(clips)), key=lambda place: clips[place].file.suffix.lower() in UNSUPPORTED_SUFFIXES)
        for place in order:
            clip = clips[place]
            forms = {
                "speaker": {clip.speaker} - {""},
                "id": {clip.stem, clip.id, nfc(clip.file.name)},
                "path": {clip.name, shown(clip.file), nfc(Path(os.path.abspath(clip.file)).as_posix())},
            }[self.key]
            for form in forms:
                if clip.file.suffix.lower() in AUDIO_SUFFIXES or form not in index or self.key == "speaker":
                    index.setdefault(form, set()).add(place)
        return index

    def _places(self, key: str, exact: dict[str, set[int]]) -> set[int] | None:
        """The clips that a key means as written, else in its plain form, else as a path from the working directory."""
        plain = self._plain(key)
        found = exact.get(key) or exact.get(plain)
        return exact.get(nfc(os.path.abspath(plain))) if self.key == "path" and not found else found

    def _plain(self, key: str) -> str:
        """A key without what spreadsheets, shells and other systems add to a path or a file's name."""
        key = posixpath.normpath(key.replace("\\", "/"))
        stem, suffix = posixpath.splitext(key)
        return stem if self.key == "id" and suffix.lower() in AUDIO_SUFFIXES | UNSUPPORTED_SUFFIXES else key

    def _take(self, key: str, places: set[int] | None, rows_of: dict[int, str], clips: list[Clip]) -> bool:
        if not places:
            return False
        names = sorted(clips[place].name for place in places)
        if self.key != "speaker" and len(places) > 1:
            raise EqknobsError(
                f"{self.path}: {self.key} {key!r} fits {len(places)} files ({few(names)}); "
                "key the rows by path (below the folder) instead"
            )
        for place in places:
            if place in rows_of:
                raise EqknobsError(
                    f"{self.path}: {self.key} {rows_of[place]!r} and {key!r} both mean {names[0]}; keep one row"
                )
            rows_of[place] = key
        return True

    def _report(self, clips: list[Clip], rows_of: dict[int, str], unmatched: list[str], bare: int) -> None:
        if len(unmatched) == len(self.rows):
            raise EqknobsError(
                f"{self.path}: no row matches a file of the corpus ({self.key} {few(unmatched)}); "
                "key the rows by id (file name without suffix), path below the folder, or speaker"
                + ("" if all(clip.speaker for clip in clips) else ", and see data.speaker_from")
            )
        without = [clip.name for place, clip in enumerate(clips) if place not in rows_of]
        said = f"{self.path}: {len(self.rows) - len(unmatched)} of {len(self.rows)} rows name {len(rows_of)} of "
        said += f"{len(clips)} files by {self.key}"
        said += f", {bare} of them without their leading zeros" if bare else ""
        said += f"; no file for {len(unmatched)}: {few(unmatched)}" if unmatched else ""
        odd = {row["sex"] for row in self.rows.values() if row.get("sex", "F")[:1].upper() not in ("F", "M")}
        said += f"; sex is neither F nor M: {few(sorted(odd))}" if odd else ""
        if without and len(unmatched) > UNMATCHED_SHARE * len(self.rows):
            raise EqknobsError(
                f"{said}; {counted(len(without), 'file')} without a row: {few(without)}; "
                f"mend column {self.key} or remove those rows"
            )
        print(said, flush=True)


def read_labels(path: str | None, split_by: str | None, clips: list[Clip]) -> Labels | None:
    """The labels CSV `data.labels`; None without one. Empty cells say nothing.

    Column names count without case and blanks around them, cells without blanks around them and on one line. The key
    is the first of the columns id, path and speaker that is filled and fits any of `clips`. Raises EqknobsError for a
    file that is not there or no CSV, without a key or anything to give, and for a key that is twice there or missing.
    """
    if not path:
        return None
    if not Path(path).is_file():
        raise EqknobsError(f"data.labels: no file {path}; give a CSV with the column id, path or speaker, or null")
    table = read_text_csv(path)
    table.columns = [one_line(name).casefold() for name in table.columns]
    names = [name for name in table.columns if name]
    used = [name for name in dict.fromkeys((*KEYS, *SAID, *ALSO, split_by)) if name in names]
    if twice := [name for name in used if names.count(name) > 1]:
        raise EqknobsError(f"{path}: column {twice[0]!r} occurs twice; keep one")
    if not set(KEYS) & set(names):
        raise EqknobsError(
            f"{path}: no column id, path or speaker, only {', '.join(names)}; add one, set off by commas"
        )
    if split_by and split_by not in names:
        raise EqknobsError(f"{path}: no column {split_by}, which data.split_by names; add it or set null")
    cells = table[used].map(lambda cell: nfc(one_line(cell)))
    cells = cells[(cells != "").any(axis=1)]  # spreadsheets write empty rows behind the last
    if cells.empty:
        raise EqknobsError(f"{path}: holds no rows; fill it or set data.labels: null")
    keys = table.loc[cells.index, [name for name in KEYS if name in names]].map(lambda cell: nfc(cell.strip()))
    key = _choose_key(path, keys, clips, "text" in names)
    columns = [name for name in (*SAID, *ALSO) if name in names and name != key] + [split_by] * bool(split_by)
    if not columns:
        raise EqknobsError(
            f"{path}: no column speaker, sex, accent or text beside {key}; add one, or set data.labels: null"
        )
    if missing := int((keys[key] == "").sum()):
        raise EqknobsError(f"{path}: {counted(missing, 'row')} without {key}; fill the column, or remove those rows")
    if (again := keys[key].duplicated()).any():
        raise EqknobsError(f"{path}: {key} {keys[key][again].iloc[0]!r} occurs twice; keep one row")
    rows = cells[list(dict.fromkeys(columns))].set_index(keys[key]).to_dict("index")
    return Labels(path, key, {name: {c: said for c, said in row.items() if said} for name, row in rows.items()})


def _choose_key(path: str, keys: pd.DataFrame, clips: list[Clip], texts: bool) -> str:
    """The first column of which a cell fits a clip; else the first that is filled, for the message of the misfit."""
    filled = [name for name in keys if (keys[name] != "").any()]
    if not filled:
        raise EqknobsError(f"{path}: column {' and '.join(keys)} is empty; fill it, or set data.labels: null")
    for name in filled:
        # Rows of single files, whose ids are wrong, must not pass for rows of speakers.
        of_files = name == "speaker" and name != filled[0] and (texts or keys[name].duplicated().any())
        if not of_files and Labels(path, name, {key: {} for key in keys[name]}).fits(clips):
            return name
    return filled[0]
