"""Who may import whom: foundations no room, rooms no stage, stages no report; imports inside functions count too."""

from pathlib import Path

import eqknobs
from eqknobs.provenance import imported_files

PACKAGE = Path(eqknobs.__file__).parent
ROOMS = {  # room -> the rooms that it may import
    "packing": set(),
    "models": {"packing"},
    "corpus": {"models"},
    "sae": {"corpus"},
    "sound": {"corpus", "models"},
    "speaking": {"models", "sound"},
    "evidence": {"corpus"},  # the registry of properties
    "stages": {"corpus", "models", "sae", "sound", "speaking", "evidence", "packing"},
    "report": {"evidence", "stages"},
}
# Stages that go on from what another one computes.
AFTER = {
    "importance": {"probes"},
    "lm_layers": {"probes"},
    "lm_recipe": {"speech_lm_training"},
    "phones": {"probes"},
    "lm_steering": {"lm_layers", "probes"},
    "steering": {"probes"},
}
ENTRIES = {
    "audiosae.py",
    "cli.py",
    "compress.py",
    "explore.py",
    "talk.py",
    "transcribe.py",
}  # commands stand above the rooms
# Foundations that reach into a room, and the only files there that they may.
REACH = {"config.py": ("checks.py", "sites.py"), "provenance.py": ("files.py",)}


def imports() -> list[tuple[Path, Path]]:
    """Pairs of files of the package, relative to it: (who imports, what)."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent != PACKAGE]
    pairs = [(file, found) for file in files for found in sorted(imported_files(file)) if found.parent != file.parent]
    return [(a.relative_to(PACKAGE), b.relative_to(PACKAGE)) for a, b in pairs]


def test_every_room_has_its_line() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def test_foundations_import_no_room() -> None:
    foundations = [(a, b) for a, b in imports() if len(a.parts) == 1 and a.name not in ENTRIES]
    assert [f"{a} imports {b}" for a, b in foundations if b.name not in ("__init__.py", *REACH.get(a.name, ()))] == []


def test_rooms_import_only_rooms_below_them() -> None:
    between = [(a, b) for a, b in imports() if len(a.parts) > 1 and len(b.parts) > 1 and a.parts[0] != b.parts[0]]
    assert [f"{a} imports {b}" for a, b in between if b.parts[0] not in ROOMS[a.parts[0]]] == []
    assert any(a.parts[0] == "report" and b.parts[0] == "stages" for a, b in between)


def test_no_room_imports_an_entry() -> None:
    assert [f"{a} imports {b}" for a, b in imports() if len(a.parts) > 1 and b.name in ENTRIES] == []


def test_stages_import_no_other_stage_but_the_one_they_go_on_from() -> None:
    stages = [(a, b) for a, b in imports() if a.parts[0] == b.parts[0] == "stages" and len(b.parts) == 3]
    assert [f"{a} imports {b}" for a, b in stages if b.parts[1] not in AFTER.get(a.parts[1], set())] == []
