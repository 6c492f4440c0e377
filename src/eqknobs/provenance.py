"""What a stage's results were made from, beside its slice of the configuration: code, models, speech, labels.

Snakemake compares files from outside by their time stamps, which `cp -p`, `rsync -a` and `tar` keep, and knows nothing
of imported modules. So each rule's parameter holds digests of the contents: other content, other parameters, rerun.
"""

import ast
import csv
import hashlib
import html
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import unquote

PACKAGE = Path(__file__).resolve().parent
STORE = Path(".snakemake/eqknobs-digests.json")
REHASH = "EQKNOBS_REHASH"  # environment variable: set to 1, every file is read again
VERSION = 1  # of what a digest means
SETTLED_SECONDS = 2.0  # a file written later than this before it is read may change again within its time stamp
LONG_BYTES = 1 << 30  # more to read than this, and progress is shown


def _module_file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements, and those inside them; expressions, which are most of a tree, are passed by."""
    for node in body:
        yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _statements(getattr(node, part, ()))


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """The files of this package that a Python file imports, itself not included.

    Imports inside functions count; `from eqknobs.x import y` counts x, and y where y is a module.
    """
    names: set[str] = set()
    for node in _statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    found = {_module_file(name) for name in names if name.split(".")[0] == "eqknobs"}
    return frozenset(file for file in found if file is not None)


@cache
def code_inputs(script: str | Path) -> list[str]:
    """A script and its transitive in-package imports, relative to the working directory where they are below it.

    Data files that a module reads (`page.html.j2` beside `page.py`) belong to it by their stem.
    """
    todo, seen = [Path(script).resolve()], set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += imported_files(file)
            # Importing a.b.c runs a/__init__.py and a/b/__init__.py too.
            todo += [folder / "__init__.py" for folder in file.parents if folder.is_relative_to(PACKAGE)]
    data = {f for module in seen for f in module.parent.glob(f"{module.stem}.*") if f.suffix in (".j2", ".css", ".js")}
    here = Path.cwd()
    return sorted(str(f.relative_to(here)) if f.is_relative_to(here) else str(f) for f in seen | data)


def module_inputs(name: str) -> list[str]:
    """As `code_inputs`, of a module of this package by its dotted name."""
    return code_inputs(_module_file(name))


def content(path: str | Path) -> str:
    """Digest of what a file says: of code without comments, docstrings and layout, of a table its cells, of all else
    its bytes.

    Code and tables that cannot be parsed count by their bytes.
    """
    path = Path(path)
    try:
        if path.suffix == ".py":
            said = ast.dump(_without_docstrings(ast.parse(path.read_bytes())))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                said = json.dumps([[cell.strip() for cell in row] for row in csv.reader(file) if any(row)])
        else:
            said = None
    except (SyntaxError, csv.Error, ValueError):  # UnicodeDecodeError is a ValueError
        said = None
    if said is not None:
        return hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return tree


def corpus_files(folder: str | Path) -> list[str]:
    """What the manifest is drawn from in a folder: sound files, transcripts and SPEAKERS.TXT (also right above it)."""
    from eqknobs.corpus.files import AUDIO_SUFFIXES, TEXT_ENDS, UNSUPPORTED_SUFFIXES, walk  # here: it imports pandas

    read = tuple(AUDIO_SUFFIXES | UNSUPPORTED_SUFFIXES | set(TEXT_ENDS))
    found = [str(file) for file in walk(Path(folder))[0] if file.name.lower().endswith(read)]
    return [*found, str(Path(folder).parent / "SPEAKERS.TXT")]


class Digests:
    """Digests of files, each read again only when its size, times or inode changed.

    They are kept in the JSON file `store`; an unreadable one is begun anew, and the environment variable
    EQKNOBS_REHASH=1 reads all files again.
    """

    def __init__(self, store: str | Path = STORE):
        self.store = Path(store)
        self._kept: dict[str, dict[str, list]] | None = None

    def _on_disk(self) -> dict[str, dict[str, list]]:
        try:
            found = json.loads(self.store.read_text())
            if found["version"] == VERSION:
                return {"files": dict(found["files"]), "marks": dict(found["marks"])}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {"files": {}, "marks": {}}

    def _section(self, name: str) -> dict[str, list]:
        if self._kept is None:
            self._kept = self._on_disk()
            if os.environ.get(REHASH, "0") not in ("", "0"):
                self._kept["files"] = {}
        return self._kept[name]

    def _keep(self, section: str, new: dict[str, list]) -> None:
        """Add to what is on disk by now: another process may have added something too."""
        from eqknobs.io import atomic_path  # here: it imports pandas

        self._section(section).update(new)
        kept = self._on_disk()
        kept[section].update(new)
        try:
            with atomic_path(self.store) as temporary:
                temporary.write_text(json.dumps({"version": VERSION, **kept}))
        except OSError as error:  # a read-only folder, in which a dry run still works
            print(f"{self.store} cannot be written ({error.strerror}): files are read anew each time", file=sys.stderr)

    def of(self, files: Iterable[str | Path]) -> str:
        """One digest of several files, names included; their order does not matter, a missing one counts as such."""
        marks: dict[str, list] = {}
        for name in sorted({str(file) for file in files}):
            with suppress(OSError):
                found = os.stat(name)
                if stat.S_ISREG(found.st_mode):  # reading a pipe would wait for its writer
                    marks[name] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self._section("files")
        changed = [name for name, mark in marks.items() if known.get(name, [None])[:-1] != mark]
        amount, read = sum(marks[name][0] for name in changed), {}
        if amount >= LONG_BYTES:
            print(f"reading {len(changed)} new or changed files ({amount / 1e9:.1f} GB) once", file=sys.stderr)
        for name in changed:
            try:
                read[name] = content(name)
            except OSError as error:  # whoever needs the file will say more
                read[name] = f"unreadable: {error.strerror}"
        settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        if new := {name: [*marks[name], value] for name, value in read.items() if max(marks[name][1:3]) < settled}:
            self._keep("files", new)
        whole = hashlib.sha256()
        for name in sorted({str(file) for file in files}):
            value = read[name] if name in read else known[name][-1] if name in marks else "missing"
            whole.update(f"{name}\0{value}\0".encode(errors="surrogateescape"))
        return whole.hexdigest()[:16]

    def of_sounds(self, index: str | Path, keep: bool = True) -> str:
        """A mark of a folder of sounds that changes when some that its index names were lost, and then stays.

        index: the table of a stage's renders, the manifest of synthetic speech, or the report's page. keep: not in a
        dry run, after which the lost sound may come back. Sounds are no outputs of their own, as nobody knows their
        names beforehand; so that lost ones are made again, the rule that makes them has this mark in its parameter.
        """
        index = Path(index)
        mark = self._section("marks").get(str(index), [])
        if index.is_file() and not all((index.parent / name).is_file() for name in _sounds(index)):
            lost = [f"{index.stat().st_mtime_ns}"]
            if keep and mark != lost:
                self._keep("marks", {str(index): lost})
            mark = lost
        return "".join(mark)


def _sounds(index: Path) -> set[str]:
    """Sounds that an index names, relative to its folder; of the report also its pages, and the sounds they name; of a
    manifest whose speech lies beside it, that."""
    if index.suffix == ".html":
        pages = "".join(page.read_text() for page in index.parent.glob("*.html"))
        return {unquote(html.unescape(name)) for name in re.findall(r'href="(audio/[^"]+|[\w.@-]+\.html)"', pages)}
    with index.open(encoding="utf-8", newline="") as file:
        rows = [row.get("file") or Path(row.get("path") or "").name for row in csv.DictReader(file)]
    return {name for name in rows if name}


DIGESTS = Digests()
