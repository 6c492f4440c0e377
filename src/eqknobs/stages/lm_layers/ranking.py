"""How acoustic each attention head is, from raw counts by clip: what tables show and pruning goes by."""

import numpy as np
import pandas as pd

ACOUSTIC, SEMANTIC = "centroid", "token"
KEYS = ["stream", "split", "property", "lag"]
HALVES = ("a", "b")
COLUMNS = "layer head property accuracy selectivity half_a half_b".split()


def heads_in(rows: pd.DataFrame) -> list[str]:
    """The columns that are heads, `<layer>.<head>`, in order."""
    found = [column for column in rows if column.partition(".")[0].isdecimal()]
    return sorted(found, key=lambda name: [int(part) for part in name.split(".")])


def accuracies(rows: pd.DataFrame, heads: list[str]) -> np.ndarray:
    """Σ correct / Σ frames of every head."""
    return rows[heads].sum().to_numpy(float) / max(rows["frames"].sum(), 1)


def beyond(accuracy: np.ndarray, majority: float) -> np.ndarray:
    """Accuracy on a scale on which always naming the commonest class is 0 and being always right is 1."""
    return (accuracy - majority) / max(1 - majority, 1e-12)


def rank_heads(clips: pd.DataFrame) -> pd.DataFrame:
    """One row a stream, split, property and head: accuracy, selectivity, half_a, half_b, majority, shuffled.

    clips: raw counts as `compute.probe_heads` writes them. selectivity: that of the acoustic property less that of the
    semantic one, each as in `beyond`. half_a, half_b: accuracy of probes that were fitted and scored on either half of
    the clips.
    """
    heads, found = heads_in(clips), []
    for key, rows in clips.groupby(KEYS, sort=False):
        true = rows[rows["labels"] == "true"]
        whole = true[true["half"] == "all"]
        halves = {f"half_{half}": accuracies(true[true["half"] == half], heads) for half in HALVES}
        shuffled = accuracies(rows[rows["labels"] == "shuffled"], heads)
        majority = float(whole["majority"].sum() / whole["frames"].sum())
        places = [[int(part) for part in name.split(".")] for name in heads]
        columns = dict(zip(("layer", "head"), zip(*places, strict=True), strict=True))
        measured = {"accuracy": accuracies(whole, heads), **halves, "majority": majority, "shuffled": shuffled}
        found.append(pd.DataFrame({**dict(zip(KEYS, key, strict=True)), **columns, **measured}))
    table = pd.concat(found, ignore_index=True)
    table["selectivity"] = np.nan
    for _, rows in table.groupby(["stream", "split"], sort=False):
        sides = []
        for name in (ACOUSTIC, SEMANTIC):
            side = rows[rows["property"] == name].set_index(["layer", "head"])
            sides.append(beyond(side["accuracy"], side["majority"].max()))
        selectivity = sides[0] - sides[1]
        table.loc[rows.index, "selectivity"] = selectivity.loc[list(zip(rows["layer"], rows["head"]))].to_numpy()
    return table


def pruning_order(clips: pd.DataFrame) -> pd.DataFrame:
    """What pruning reads: `COLUMNS` on val, of the agent's stream."""
    found = rank_heads(clips)
    return found[(found["stream"] == "agent") & (found["split"] == "val")][COLUMNS].reset_index(drop=True)
