"""Draw the package's rooms into docs/architecture.md: `python tools/architecture.py`; `--check` only compares.

An arrow: files of one room import files of another. Foundations, which all use, are drawn without arrows to them.
"""

import re
import sys
from pathlib import Path

from eqknobs.provenance import imported_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/eqknobs"
PAGE = ROOT / "docs/architecture.md"
FOUNDATIONS = "foundations"
TITLES = {
    FOUNDATIONS: "errors, io, audio, config, provenance, pieces …",
    "corpus": "speech, manifest, labels, activation caches",
    "models": "one protocol, one file a kind",
    "packing": "weights as packed integers",
    "sae": "the SAE engine",
    "sound": "renders, metrics, judges",
    "speaking": "what speech LMs are asked and answer",
    "evidence": "estimates, comparisons, drawing",
    "report": "tables and pages, loops over the sections",
    "scripts": "workflow/scripts: input, output, cfg",
}


def room(path: Path) -> str:
    """The room of a file: its folder in the package (of stages, the stage), a script's, or the foundations."""
    if not path.is_relative_to(PACKAGE):
        return "scripts"
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return FOUNDATIONS
    return "/".join(parts[:2]) if parts[0] == "stages" and len(parts) > 2 else parts[0]


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports), from the code; a package's empty front counts for nothing."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "workflow/scripts").glob("*.py")]
    found = {(room(path), room(used)) for path in files for used in imported_files(path)}
    return {(a, b) for a, b in found if a != b and "stages" not in (a, b)}


def picture() -> str:
    """A mermaid graph, rooms above what they import."""
    edges = {(a, b) for a, b in arrows() if FOUNDATIONS not in (a, b)}
    rooms = sorted({name for edge in arrows() for name in edge})
    node = {name: name.replace("/", "_") for name in rooms}
    lines = ["flowchart TB"]
    for name in rooms:
        if not name.startswith("stages/"):
            lines.append(f'    {node[name]}["<b>{name}</b><br>{TITLES.get(name, "")}"]')
    lines.append('    subgraph stages["stages: one folder each"]')
    lines += [f'        {node[name]}["{name.removeprefix("stages/")}"]' for name in rooms if name.startswith("stages/")]
    lines.append("    end")
    lines += [f"    {node[a]} --> {node[b]}" for a, b in sorted(edges)]
    return "\n".join(lines)


def page() -> str:
    """docs/architecture.md with its picture as the code is now. Raises SystemExit if it has no place for one."""
    block = f"```mermaid\n{picture()}\n```"
    text, found = re.subn(r"```mermaid\n.*?```", lambda _: block, PAGE.read_text(), flags=re.S)
    if found != 1:
        sys.exit(f"error: {PAGE} has {found} mermaid blocks, one is wanted")
    return text


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else "stale: docs/architecture.md; run python tools/architecture.py")
    PAGE.write_text(page())
