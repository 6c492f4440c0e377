"""The one exception users are meant to see."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class EqknobsError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with status 1 and the error's one line instead of a traceback."""
    try:
        yield
    except EqknobsError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
