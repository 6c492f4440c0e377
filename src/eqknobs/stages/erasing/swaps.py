"""Audio-RAVEL: whether a label, and nothing else, goes from one clip to another with a few features.

After RAVEL (Huang et al. 2024, arXiv 2402.17700): the mean activation of a clip gets the values that some features have
in another clip, whose label differs. *Cause*: a probe of raw activations then tells the other clip's label.
*Isolation*: probes of the other tasks tell what they told before. Rivals take over raw dimensions, principal
components, random features, what LEACE would erase, nothing, or the whole clip. How many columns are taken is chosen on
val (of a task that has no clips there, on train).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from eqknobs.stages.erasing import probes
from eqknobs.stages.erasing.samples import Task
from eqknobs.stages.erasing.spaces import Space, random_order

SWAP_COLUMNS = "task space order seed count id speaker split pairs caused asked kept".split()


@dataclass(frozen=True)
class Swap:
    """What is taken from the other clip: columns of values [n, width], which act on activations by directions
    [width, d]."""

    space: str
    order: str
    seed: int
    count: int
    values: np.ndarray
    directions: np.ndarray

    def __call__(self, raw: np.ndarray, base: np.ndarray, source: np.ndarray) -> np.ndarray:
        """Activations of the clips base [n] with what is taken from the clips source [n]."""
        return raw[base] + (self.values[source] - self.values[base]) @ self.directions


def swaps_of(
    spaces: dict[str, Space], axes: np.ndarray, orders: dict[str, np.ndarray], taken: np.ndarray, cfg: Any
) -> Iterator[Swap]:
    """Every intervention, for every number of columns.

    axes: principal axes [d, d] in columns; orders: columns of each space in Fisher order; taken: what LEACE takes out
    [d, d].
    """
    raw = spaces["raw"].values
    identity = np.eye(raw.shape[1])
    coded = spaces["reconstruction"]
    yield Swap("nothing", "", 0, 0, raw, np.zeros_like(identity))
    yield Swap("whole", "", 0, len(identity), raw, identity)
    yield Swap("raw", "leace", 0, probes.rank(taken), raw, taken.T)
    assert coded.directions is not None
    for count in cfg["swaps"]:
        if count <= coded.width:
            drawn = [("fisher", 0, orders["features"])]
            drawn += [("random", s, random_order(coded.width, s, cfg)) for s in range(cfg["random"]["seeds"])]
            for order, seed, columns in drawn:
                own = columns[:count]
                yield Swap("features", order, seed, count, coded.values[:, own], coded.directions[own])
        for name, directions in (("raw", identity), ("pca", axes.T)):
            if count <= len(identity):
                own = orders[name][:count]
                yield Swap(name, "fisher", 0, count, spaces[name].values[:, own], directions[own])


def pairs_of(task: Task, part: str, sources: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of clips and of the clips from which they get something: of other labels, `sources` a clip, by seed."""
    rng = np.random.default_rng([seed, 71])
    rows, codes = task.rows[part], task.codes[part]
    base: list[int] = []
    source: list[int] = []
    for row, code in zip(rows, codes, strict=True):
        drawn = rng.permutation(rows[codes != code])[:sources]
        base += [int(row)] * len(drawn)
        source += drawn.tolist()
    return np.array(base, np.int64), np.array(source, np.int64)


class Judges:
    """What probes of raw activations, of a task and of the others, say of pairs of one part.

    probes_of: by task; they learnt from train.
    """

    def __init__(self, task: Task, others: list[Task], part: str, probes_of: dict[str, probes.Probe], cfg: Any):
        self.task, self.raw = task, task.samples.raw
        # With three clips a voice none is left for val.
        drawn = part if len(task.rows[part]) else "train"
        self.base, self.source = pairs_of(task, drawn, cfg["sources"], cfg["seed"])
        self.own, self.beside = probes_of[task.name], [probes_of[one.name] for one in others]
        self.wanted = task.labels().loc[self.source].to_numpy()
        self.asked = [np.isin(self.base, one.labels().index) for one in others]
        self.before = [probe.say(self.raw[self.base]) for probe in self.beside]

    def counts(self, swap: Swap) -> pd.DataFrame:
        """Of each clip: row, pairs, caused (of them), asked (answers of other tasks), kept (of them)."""
        after = swap(self.raw, self.base, self.source)
        found = pd.DataFrame({"row": self.base, "pairs": 1, "caused": self.own.say(after) == self.wanted})
        same = [probe.say(after) == said for probe, said in zip(self.beside, self.before, strict=True)]
        found["asked"] = np.sum(self.asked, axis=0, dtype=np.int64) if same else 0
        kept = [one & own for one, own in zip(same, self.asked, strict=True)]
        found["kept"] = np.sum(kept, axis=0, dtype=np.int64) if same else 0
        return found.groupby("row", as_index=False).sum().astype(int)


def goodness(counts: list[pd.DataFrame]) -> float:
    """Mean of cause and isolation over repeats, of clips that other tasks ask about; else of cause alone."""
    every = pd.concat(counts)
    total = (every[every["asked"] > 0] if every["asked"].any() else every).sum()
    cause = total["caused"] / max(total["pairs"], 1)
    return float((cause + total["kept"] / total["asked"]) / 2 if total["asked"] else cause)


def swap_features(
    task: Task,
    others: list[Task],
    spaces: dict[str, Space],
    axes: np.ndarray,
    orders: dict[str, np.ndarray],
    taken: np.ndarray,
    cfg: Any,
) -> pd.DataFrame:
    """Every intervention of a task at the number of columns that val chooses; it takes a probe of each task.

    cfg: `eqknobs.stages.erasing.compute.ErasingCfg`. Returns `SWAP_COLUMNS`, one row a (intervention, test clip).
    """
    raw = task.samples.raw
    learnt = {one.name: probes.fit(raw[one.rows["train"]], one.codes["train"], cfg["c"]) for one in [task, *others]}
    every = list(swaps_of(spaces, axes, orders, taken, cfg))
    val, test = (Judges(task, others, part, learnt, cfg) for part in ("val", "test"))
    tried: dict[tuple[str, str], dict[int, list[Swap]]] = {}
    for one in every:
        tried.setdefault((one.space, one.order), {}).setdefault(one.count, []).append(one)
    rows = []
    for (space, order), by_count in tried.items():
        count = next(iter(by_count))
        if len(by_count) > 1:
            good = {n: goodness([val.counts(one) for one in own]) for n, own in sorted(by_count.items())}
            count = max(good, key=lambda n: good[n])  # of equal ones the fewest columns
        for one in by_count[count]:
            found = test.counts(one)
            about = task.samples.about.iloc[found["row"]][["id", "speaker"]].reset_index(drop=True)
            keys = {"task": task.name, "space": space, "order": order, "seed": one.seed, "count": count}
            rows.append(found.drop(columns="row").join(about).assign(split="test", **keys))
    return pd.concat(rows, ignore_index=True)[SWAP_COLUMNS]
