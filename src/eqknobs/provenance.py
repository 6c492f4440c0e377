"""Which library files a script depends on, found without importing anything.

Snakemake reruns a job when an input changes, but not when an imported module does; listing the modules as inputs
closes that gap.
"""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def _module_file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """The files of this package that a Python file imports, itself not included.

    Imports inside functions count; `from eqknobs.x import y` counts x, and y where y is a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    found = {_module_file(name) for name in names if name.split(".")[0] == "eqknobs"}
    return frozenset(file for file in found if file is not None)


def code_inputs(script: str | Path) -> list[str]:
    """A script and its transitive in-package imports, relative to the working directory where they are below it.

    Data files that a module reads (`report.html.j2` beside `report.py`) belong to it by their stem.
    """
    todo, seen = [Path(script).resolve()], set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += imported_files(file)
    data = {f for module in seen for f in module.parent.glob(f"{module.stem}.*") if f.suffix in (".j2", ".css", ".js")}
    here = Path.cwd()
    return sorted(str(f.relative_to(here)) if f.is_relative_to(here) else str(f) for f in seen | data)
