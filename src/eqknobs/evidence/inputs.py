"""The files that tables and report may read: those that their rule declares, by the names of `docs/layout.md`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, read_json


class Inputs:
    """Reads declared files only, so that whatever a table rests on reruns it.

    run_dir: `results/<run>`, below which names ("scores/originals.csv") are; a file outside goes by its own path.
    files: what the rule declares (`snakemake.input`).
    """

    def __init__(self, run_dir: str | Path, files: Iterable[str | Path]):
        self.run_dir = Path(run_dir)
        self.declared = {Path(file) for file in files}

    @classmethod
    def below(cls, run_dir: str | Path, *others: str | Path) -> "Inputs":
        """Every file below a finished run's folder, and `others`: for whoever looks at a run without its rules."""
        return cls(run_dir, [*(file for file in Path(run_dir).rglob("*") if file.is_file()), *others])

    def _find(self, name: str | Path) -> Path | None:
        return next((path for path in (self.run_dir / name, Path(name)) if path in self.declared), None)

    def has(self, name: str | Path) -> bool:
        """Whether a file is declared."""
        return self._find(name) is not None

    def path(self, name: str | Path) -> Path:
        """Where a declared file lies. Raises EqknobsError for one that is not declared, or not there."""
        path = self._find(name)
        if path is None:
            raise EqknobsError(f"{name} is read, but no input of the rule; add it to the inputs in rules/")
        if not path.is_file():
            raise EqknobsError(f"{path}: no such file; run the stage that writes it")
        return path

    def csv(self, name: str | Path) -> pd.DataFrame:
        """A declared table (`eqknobs.io.read_csv`)."""
        return read_csv(self.path(name))

    def json(self, name: str | Path) -> Any:
        """A declared JSON file."""
        return read_json(self.path(name))

    def scores(self, target: str, stage: str) -> pd.DataFrame:
        """Signal and word scores of a sounding stage, one row a (condition, clip); word columns are NaN where not
        judged."""
        signal = self.csv(f"scores/{target}.{stage}.signal.csv")
        words = self.csv(f"scores/{target}.{stage}.words.csv")
        words = words.drop(columns=["speaker", "split", "transcript"], errors="ignore")
        return signal.merge(words, "left", ["id", "condition"])
