"""What a packed file's metadata say of its tensors; read without torch, for memory plans."""

import json
from collections.abc import Mapping
from typing import Any

from eqknobs.errors import EqknobsError

NAME = "packed.safetensors"
KEY, VERSION = "eqknobs-packed", 1  # one key, as safetensors writes several in any order
FIELDS = ("shape", "bits", "group", "axis", "exponent", "symmetric")  # of a packed tensor


def usual(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted of a tensor only where it differs; options: the plan's."""
    return {"group": options["group"], "symmetric": options["symmetric"], "axis": 0, "exponent": 0}


def parts(note: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what is stored of a packed tensor."""
    return ("codes", "scales") if note["symmetric"] else ("codes", "scales", "zeros")


def read_notes(said: Mapping[str, str] | None, where: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plan's options, and of each packed tensor its `FIELDS`, from a file's metadata.

    Raises EqknobsError, naming `where`, for another file or version and for notes that cannot be read.
    """
    if not said or KEY not in said:
        raise EqknobsError(f"{where}: not a packed model; make one with eqknobs compress")
    try:
        notes = json.loads(said[KEY])
        if notes["version"] != VERSION:
            raise EqknobsError(
                f"{where}: packed in version {notes['version']} of the format, this program reads {VERSION}; "
                "pack it again"
            )
        options = dict(notes["plan"])
        found = {name: usual(options) | note for name, note in notes["tensors"].items()}
        if any(field not in note for note in found.values() for field in FIELDS):
            raise ValueError("a field is missing")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EqknobsError(
            f"{where}: its notes cannot be read ({type(error).__name__}: {error}); pack it again"
        ) from error
    return options, found
