"""How far a speech LM can be pruned, scored on what it says.

Every condition (`plan`) is screened by nats, teacher-forced on held-out speech; those that are asked for speak, too,
some of them with every draw of the sampler. Answers are paired: prompt i and draw d have one seed under all conditions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from eqknobs.errors import counted
from eqknobs.io import read_csv, write_csv
from eqknobs.pieces import Pieces
from eqknobs.speaking.bench import matching, opened
from eqknobs.speaking.prompts import Asked
from eqknobs.speaking.takes import write_takes
from eqknobs.stages.lm_pruning import plan
from eqknobs.stages.lm_pruning.bench import PruningBench, PruningCfg
from eqknobs.stages.lm_pruning.codebooks import codebook_rows
from eqknobs.stages.lm_pruning.plan import INTACT, Condition
from eqknobs.stages.lm_pruning.removal import removal_rows

PLAYED = 0.1  # share of heads that are off in the answers that the page plays, or the nearest that there is


def head_orders_of(values: dict[str, Tensor], cfg: plan.HeadsCfg) -> dict[tuple[str, int], list[plan.Head]]:
    """The orders of heads, by what `PruningBench.calibrate` found of them (and of layers)."""
    return plan.head_orders({key: value for key, value in values.items() if key != "layers"}, cfg)


def conditions_of(
    values: dict[str, Tensor], cfg: PruningCfg
) -> tuple[list[Condition], dict[tuple[str, int], list[plan.Head]]]:
    """(every condition but the intact one, the orders of heads).

    values: of `PruningBench.calibrate`, and `accuracy`.
    """
    layers, acoustic = len(values["layers"]), values["accuracy"].mean(1) if "accuracy" in values else None
    orders = head_orders_of(values, cfg["heads"])
    found = list(plan.head_conditions(orders, cfg["heads"]))
    if cfg["weights"]:
        found += plan.weight_conditions(cfg["weights"], acoustic, layers)
    if cfg["layers"]:
        found += plan.layer_conditions(plan.layer_orders(values["layers"], cfg["layers"]), cfg["layers"])
    return found, orders


def order_rows(orders: dict[tuple[str, int], list[plan.Head]], values: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row a head of each order: when it goes (from 0), and the value that decides it."""
    by, rows = {"acoustic_first": "accuracy", "acoustic_last": "accuracy"}, []
    for (order, seed), heads in orders.items():
        value = values.get(by.get(order, order))
        for rank, (layer, head) in enumerate(heads):
            worth = np.nan if value is None else float(value[layer, head])
            rows.append({"order": order, "seed": seed, "rank": rank, "layer": layer, "head": head, "value": worth})
    return rows


def real_rows(bench: PruningBench) -> list[dict[str, Any]]:
    """The gates' values of held-out speech through the codec, which no model has generated."""
    rows = []
    for i, (speaker, text, tokens) in enumerate(bench.speech["real"]):
        asked = Asked(f"{i:03d}", speaker, bench.speech["asked"][0].prompt, tokens.codes, text)
        record = bench.judge.record(asked, tokens)
        if (tokens.text < 0).all():  # a user has no monologue
            record |= dict.fromkeys(("repetition", "pads", "overlap"), np.nan)
        rows.append({"id": asked.id, "speaker": speaker, **record})
    return rows


def played(conditions: Sequence[Condition]) -> list[Condition]:
    """The intact model, and two orders with about `PLAYED` of the heads off."""
    heads = [c for c in conditions if c.granularity == "heads" and c.repair == "zero"]
    chosen = [INTACT]
    for order in ("acoustic_first", "random"):
        mine = sorted((c for c in heads if c.order == order), key=lambda c: (abs(c.share - PLAYED), c.seed))
        chosen += mine[:1]
    return chosen


def write_sounds(bench: PruningBench, conditions: Sequence[Condition], folder: Path) -> None:
    """The first answers of what is `played`."""
    shown = [(c, {"order": c.order, "share": c.share}) for c in played(conditions)]
    takes = (take for c, columns in shown for take in bench.takes(c, columns, bench.cfg["listen"]))
    write_takes(bench.judge, takes, folder)


class Outputs(TypedDict):
    """Files that `prune_and_score` writes; `sounds` is a folder."""

    orders: str
    nats: str
    answers: str
    real: str
    codebooks: str
    removal: str
    sounds: str


class Inputs(TypedDict):
    """Files that it reads: probe accuracies of heads (layer, head, property, accuracy), where an order needs them; the
    manifest of the run's speech, where people talk to the model; where the codes of sentences go."""

    heads: str | None
    manifest: str | None
    codes: Path


def scored(bench: PruningBench, conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """One record an answer of the intact model and of the conditions that speak."""
    cfg = bench.cfg
    answered = matching(conditions, cfg["answered"], "lm_pruning.answered")
    confirmed = matching(answered, cfg["confirmed"], "lm_pruning.confirmed")
    records = bench.hear_intact(cfg["draws"])
    for condition in tqdm(answered, desc="answers", unit="condition"):
        sure = condition in confirmed
        for draw in range(cfg["draws"]) if sure else (0,):
            records += bench.score(condition, draw, rated=sure)
    return records


def prune_and_score(cfg: PruningCfg, inputs: Inputs, out: Outputs, pieces: Pieces | None = None) -> None:
    """Score a model under every condition. Each file appears when it is whole."""
    found = opened(cfg, inputs["manifest"], inputs["codes"], pieces or Pieces(None), __name__)
    bench = PruningBench(*found[:3], cfg, found[3])
    model, values = bench.model, bench.calibrate()
    if inputs["heads"] is not None:
        sizes = model.config.layers, model.config.heads
        values["accuracy"] = plan.accuracies(read_csv(inputs["heads"]), cfg["property"], *sizes)
    conditions, orders = conditions_of(values, cfg)
    about = {"model": model.name, "split": "test"}

    def write(path: str, rows: list[dict[str, Any]]) -> None:
        write_csv(path, pd.DataFrame([about | row for row in rows]) if rows else pd.DataFrame(columns=list(about)))

    write(out["orders"], order_rows(orders, values))
    screened = [
        row
        for condition in tqdm((INTACT, *conditions), desc="nats", unit="condition")
        for row in bench.screen(condition)
    ]
    print(f"{counted(len(conditions), 'condition')} screened", flush=True)
    write(out["nats"], screened)
    write(out["answers"], scored(bench, conditions))
    write(out["real"], real_rows(bench))
    write(out["codebooks"], codebook_rows(bench, cfg["codebooks"]) if cfg["codebooks"] else [])
    write_sounds(bench, conditions, Path(out["sounds"]))
    removed: list[dict[str, Any]] = []
    if removal := cfg["removal"]:
        ((_, order),) = head_orders_of(values, {**cfg["heads"], "orders": [removal["order"]]}).items()
        said = bench.speech["calibration"][: cfg["batch"]]
        del bench, model.net  # another copy is about to be loaded
        removed = removal_rows(model, cfg, order, said)
    write(out["removal"], removed)
