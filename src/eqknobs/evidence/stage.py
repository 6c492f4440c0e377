"""What a stage offers to tables and report, beside its computation: a module `tables` and a module `section`.

Both are plain modules in `stages/<stage>/`, named in one list each: `eqknobs.report.tables.STAGES` and
`eqknobs.report.page.SECTIONS`. They are two files, as editing a figure must not make the tables anew, and no
computation imports either. `cfg["stages"]` says which stages a run has, with the targets and settings of each.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import pandas as pd

from eqknobs.evidence.estimates import IntervalsCfg
from eqknobs.evidence.inputs import Inputs


class TablesCfg(IntervalsCfg):
    """What all stages' tables share: the section `tables`, the run's seed, and what it works on."""

    unmeasurable_wer: float
    word_codebooks: int | None  # of the round trip that says whether words can be judged (`evidence.words`)
    targets: list[str]
    stages: dict[str, dict[str, Any]]  # name -> `targets` and what its modules ask for; without those that are off


class CorpusFiles(TypedDict):
    """Where the report reads of a corpus."""

    manifest: str
    facts: str | None  # a corpus.json


class ReportCfg(TablesCfg):
    """What the report takes beside it."""

    config: dict[str, Any]  # the whole configuration
    training: dict[str, str]  # bundled model -> its training.json
    bundled_speech: bool  # whether that names speakers of this corpus
    corpora: dict[str, CorpusFiles]


@dataclass(frozen=True)
class Context:
    """Where a stage's tables or section are made: one target of a run.

    own: `cfg["stages"][<stage>]`.
    facts: the target's part of `summary.json`; empty while the tables are made.
    """

    target: str
    inputs: Inputs
    cfg: TablesCfg
    own: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tabulated:
    """What a stage finds of one target.

    tables: name -> rows, with the columns of `COLUMNS`. facts: what goes into `summary.json`. comparisons: records of
    `eqknobs.evidence.comparisons.compare`, each with the `family` inside of which Holm's correction is made.
    """

    tables: dict[str, pd.DataFrame]
    facts: dict[str, Any] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A page of its own that a stage's section adds to the report, by a function `pages(at)` that lists them.

    file: its name below the report; template: below `stages/`, extending `page.html.j2`; shown: what it shows.
    """

    file: str
    title: str
    template: str
    shown: dict[str, Any]


class TablesModule(Protocol):
    """`stages/<stage>/tables.py`."""

    STAGE: str  # its key in the configuration
    COLUMNS: dict[str, str]  # table -> its columns in order, in one string
    NOTHING: dict[str, Any]  # the facts of a target that the stage does not work on

    def tabulate(self, at: Context) -> Tabulated:
        """Tables, facts and comparisons of one target."""
        ...

    def findings(self, at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Sentences on one target: records of `eqknobs.evidence.wording.headline`. facts: of all stages."""
        ...


class SectionModule(Protocol):
    """`stages/<stage>/section.py`, with `section.html.j2` beside it."""

    STAGE: str
    TITLE: str  # of its page, and in the navigation; an `ABOUT`, where there is one, says in a line what stands there
    PUBLISHED: dict[str, tuple[list[str], list[list[str]]]]  # figures of others: name -> (head, rows)
    # A `PUBLISHED_SOURCE`, where there is one, says whose; else they are of the two reports on Mimi.
    SOUNDS: bool  # whether the stage renders sound, which the report is to copy

    def show(self, at: Context) -> dict[str, Any]:
        """What the template shows of one target."""
        ...
