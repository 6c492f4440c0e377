"""The one exception users are meant to see, and how a process ends with it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)


class EqknobsError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line instead of a traceback, where the traceback would tell the user nothing.

    Status 1 for an EqknobsError and for what the operating system refuses (a read-only folder, a lost disk), 130 for
    Ctrl-C, as shells have it.
    """
    try:
        yield
    except EqknobsError as error:
        sys.exit(f"error: {printable(' '.join(str(error).split()))}")
    except OSError as error:
        sys.exit(f"error: {printable(_refused(error))}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _refused(error: OSError) -> str:
    """What the system refused, and where; the same words for whichever call met it."""
    reason = error.strerror or str(error) or type(error).__name__
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = f"{where}: {reason}; check that it exists, may be written and is on a sound disk" if where else reason
    return " ".join(said.split())


def printable(text: str) -> str:
    """Text without what a terminal obeys (escape sequences, control characters but tab and ends of line): names of
    files, transcripts and members of archives may hold any."""
    return _CONTROLS.sub("", text)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 clip", "2 clips"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
