"""Tables and summary, computed from the raw per-clip scores and from nothing else: a loop over the stages.

What a stage's table holds is told by its own module; columns: docs/tables.md.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import with_holm
from eqknobs.evidence.estimates import table
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context, TablesCfg, TablesModule
from eqknobs.io import write_csv, write_json
from eqknobs.stages.accent import tables as accent
from eqknobs.stages.codec import tables as codec
from eqknobs.stages.domains import tables as domains
from eqknobs.stages.erasing import tables as erasing
from eqknobs.stages.features import tables as features
from eqknobs.stages.hallucination import tables as hallucination
from eqknobs.stages.importance import tables as importance
from eqknobs.stages.label_search import tables as label_search
from eqknobs.stages.lm_layers import tables as lm_layers
from eqknobs.stages.lm_pruning import tables as lm_pruning
from eqknobs.stages.lm_quantisation import tables as lm_quantisation
from eqknobs.stages.lm_recipe import tables as lm_recipe
from eqknobs.stages.lm_steering import tables as lm_steering
from eqknobs.stages.phones import tables as phones
from eqknobs.stages.probes import tables as probes
from eqknobs.stages.quantisation import tables as quantisation
from eqknobs.stages.saes import tables as saes
from eqknobs.stages.speech_lm import tables as speech_lm
from eqknobs.stages.stability import tables as stability
from eqknobs.stages.steering import tables as steering

STAGES: tuple[TablesModule, ...] = (
    codec,
    saes,
    stability,
    domains,
    probes,
    phones,
    label_search,
    erasing,
    features,
    hallucination,
    steering,
    importance,
    quantisation,
    accent,
    speech_lm,
    lm_layers,
    lm_pruning,
    lm_quantisation,
    lm_recipe,
    lm_steering,
)  # in the order of the findings
COLUMNS = {name: columns for stage in STAGES for name, columns in stage.COLUMNS.items()}


def _target(inputs: Inputs, target: str, cfg: TablesCfg, tables: dict[str, list[pd.DataFrame]]) -> dict[str, Any]:
    """The summary of one target; its rows are added to `tables`."""
    facts: dict[str, Any] = {name: value for stage in STAGES for name, value in stage.NOTHING.items()}
    comparisons: list[dict[str, Any]] = []
    ran = []
    for stage in STAGES:
        own = cfg["stages"].get(stage.STAGE)
        if own is None or target not in own["targets"]:
            continue
        at = Context(target, inputs, cfg, own)
        found = stage.tabulate(at)
        for name, rows in found.tables.items():
            tables[name].append(rows)
        facts |= found.facts
        comparisons += found.comparisons
        ran.append((stage, at))
    facts["comparisons"] = with_holm(comparisons)
    facts["headlines"] = [{"stage": stage.STAGE, **line} for stage, at in ran for line in stage.findings(at, facts)]
    return facts


def write_tables(inputs: Inputs, cfg: TablesCfg, out_dir: str | Path) -> None:
    """Write each stage's tables and `summary.json` to a folder; a stage without targets has a table without
    rows, one that is off has none.

    Raises EqknobsError naming a raw score file that is missing or no input of the rule.
    """
    tables: dict[str, list[pd.DataFrame]] = {
        name: [] for stage in STAGES if stage.STAGE in cfg["stages"] for name in stage.COLUMNS
    }
    summary: dict[str, Any] = {"bootstrap": cfg["bootstrap"], "seed": cfg["seed"]}
    summary["targets"] = {target: _target(inputs, target, cfg, tables) for target in cfg["targets"]}
    for name, parts in tables.items():
        rows = pd.concat(parts, ignore_index=True) if parts else table([], COLUMNS[name])
        write_csv(Path(out_dir) / f"{name}.csv", rows)
    write_json(Path(out_dir) / "summary.json", summary)
