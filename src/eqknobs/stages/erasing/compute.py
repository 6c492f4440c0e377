"""From how few features a label can be told, and how many must go until it is gone: AudioSAE's top-k probing and
unlearning (arXiv 2602.05027, section 4.4), beside what decides those claims.

A clip is the largest value of each feature over time (as in the paper) or the mean of its activations. *Features* are
probed as they are; *reconstructions* are decoded from what is kept: two claims, two rows. Orders of columns, the eraser
and, anew for every edit, the probes are made of train and asked about test. Beside features in Fisher order, in the
order of a classifier's weights and in random order stand raw dimensions and principal components in Fisher order and,
for erasing, LEACE on the raw activations, which takes out as many dimensions as a label has values but one. What a
removal does to the other tasks is probed likewise.

A vowel is a run of frames with that label, which is told from the other vowels; each is a task of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import array_hash, read_csv, write_csv, write_json
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE
from eqknobs.stages.erasing import probes
from eqknobs.stages.erasing.checks import VOWELS
from eqknobs.stages.erasing.samples import (
    PARTS,
    Samples,
    Task,
    all_clips,
    clip_task,
    nested,
    pooled,
    second_moment,
    vowel_segments,
    vowel_tasks,
)
from eqknobs.stages.erasing.spaces import Space, living_features, principal_axes, random_order, spaces_of
from eqknobs.stages.erasing.swaps import SWAP_COLUMNS, swap_features

COLUMNS = "sae task property space order seed edit count width penalty labels converged said".split()
NAMED = 20  # first features of an order that the JSON names


class RandomCfg(TypedDict):
    seeds: int
    kept: list[int]
    removed: list[float]


class ErasingCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`)."""

    tasks: list[str]  # those of the target's corpus
    selection: str
    vowels: int
    segments: int
    kept: list[int]
    removed: list[float]
    random: RandomCfg
    shuffles: int
    c: float
    unpenalised: bool
    swaps: list[int]
    sources: int
    seed: int
    content: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Edit:
    """Columns of a space that are left: all of them, `count` that are kept, or what stays when `count` are removed."""

    space: Space
    kind: str  # all | kept | removed
    columns: np.ndarray
    count: int
    order: str = ""
    seed: int = 0
    penalty: str = "l2"

    def left(self, rows: np.ndarray) -> np.ndarray:
        """What a probe reads of samples [rows, ·]."""
        return self.space.matrix(rows, self.columns)

    def about(self) -> dict[str, Any]:
        """Columns of the table."""
        about = {"space": self.space.name, "order": self.order, "seed": self.seed, "edit": self.kind}
        return about | {"count": self.count, "width": self.space.width, "penalty": self.penalty, "labels": "true"}


class Bench:
    """Everything of one SAE of a target. `rows` gets a record a probe (COLUMNS but `sae`), `keys` what was fitted."""

    def __init__(self, sae: SAE, axes: np.ndarray, cfg: ErasingCfg):
        self.sae, self.axes, self.cfg = sae, axes, cfg
        self.rows: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.pack: dict[str, Any] = {}
        self._spaces: dict[int, dict[str, Space]] = {}

    def spaces(self, samples: Samples) -> dict[str, Space]:
        if id(samples) not in self._spaces:
            self._spaces[id(samples)] = spaces_of(samples, self.sae, living_features(samples), self.axes)
        return self._spaces[id(samples)]

    # --- one probe

    def ask(
        self, about: dict[str, Any], task: Task, matrix: Callable[[np.ndarray], np.ndarray], codes: np.ndarray
    ) -> None:
        """Fit on the task's train rows with labels codes, keep what is said of test."""
        penalty = None if about["penalty"] == "none" else self.cfg["c"]
        about = {**about, "property": task.name}
        whole = about["edit"] == "all"  # for which task makes no difference
        key = "|".join(f"{name} {about[name]}" for name in sorted(about) if not (whole and name == "task"))
        self.keys.add(key)
        if key not in self.pack:
            found = probes.fit(matrix(task.rows["train"]), codes, penalty)
            self.pack[key] = [found.converged, " ".join(map(str, found.say(matrix(task.rows["test"]))))]
        converged, said = self.pack[key]
        self.rows.append({**about, "converged": converged, "said": said})

    def edit(self, task: Task, edit: Edit, judged: Task) -> None:
        """Ask what an edit for a task leaves of that or another one."""
        self.ask({"task": task.name, **edit.about()}, judged, edit.left, judged.codes["train"])

    # --- curves

    def orders(self, task: Task) -> dict[str, list[tuple[str, int, np.ndarray]]]:
        """Of each space (order, seed, columns), made of the train rows; Fisher's comes first."""
        rows, codes = task.rows["train"], task.codes["train"]
        spaces = self.spaces(task.samples)
        found = {}
        for name in ("features", "raw", "pca"):
            scores = probes.fisher(spaces[name].ranked[rows], codes)
            found[name] = [("fisher", 0, probes.descending(scores))]
        features = spaces["features"]
        weights = probes.fit(features.ranked[rows], codes, self.cfg["c"]).weights
        self.keys.add(f"order {task.name}")
        found["features"].append(("classifier", 0, probes.descending(weights)))
        seeds = range(self.cfg["random"]["seeds"])
        found["features"] += [("random", seed, random_order(features.width, seed, self.cfg)) for seed in seeds]
        return found | {"reconstruction": found["features"]}

    def edits(self, space: Space, orders: list[tuple[str, int, np.ndarray]]) -> Iterator[Edit]:
        """Every edit of a space."""
        every = np.arange(space.width)
        yield Edit(space, "all", every, space.width)
        for order, seed, columns in orders:
            points: Any = self.cfg["random"] if order == "random" else self.cfg
            for count in (k for k in points["kept"] if k <= space.width):
                yield Edit(space, "kept", columns[:count], count, order, seed)
            for count in removed_counts(points["removed"], space.width):
                yield Edit(space, "removed", columns[count:], count, order, seed)
        if space.name == "features" and self.cfg["unpenalised"]:
            yield Edit(space, "all", every, space.width, penalty="none")
            order, seed, columns = orders[0]
            for count in removed_counts(self.cfg["removed"], space.width):
                yield Edit(space, "removed", columns[count:], count, order, seed, "none")

    def curves(self, task: Task, others: list[Task]) -> dict[str, np.ndarray]:
        """Every edit of every space; others: tasks that a removal ought not to touch. Returns the Fisher orders."""
        orders = self.orders(task)
        for name, space in self.spaces(task.samples).items():
            for edit in self.edits(space, orders[name]):
                beside = others if (edit.kind, edit.order, edit.penalty) == ("removed", "fisher", "l2") else []
                for judged in (task, *beside):
                    self.edit(task, edit, judged)
        return {name: found[0][2] for name, found in orders.items()}

    def erase(self, task: Task, others: list[Task], moment: np.ndarray) -> np.ndarray:
        """LEACE on raw activations; returns what it takes out [d, d]. moment: E x xᵀ over train's frames [d, d]."""
        raw, rows = task.samples.raw, task.rows["train"]
        taken = probes.leace(moment, raw[rows], task.codes["train"])
        mean, count = raw[rows].mean(0), probes.rank(taken)
        about = {"task": task.name, "space": "raw", "order": "leace", "seed": 0, "edit": "removed"}
        about |= {"count": count, "width": raw.shape[1], "penalty": "l2", "labels": "true"}
        for judged in [task, *others]:
            self.ask(about, judged, lambda at: raw[at] - (raw[at] - mean) @ taken.T, judged.codes["train"])
        return taken

    def nulls(self, task: Task) -> None:
        """The most frequent label of train, and features in Fisher order with shuffled labels."""
        most = int(np.bincount(task.codes["train"]).argmax())
        about = {"task": task.name, "property": task.name, "space": "majority", "order": "", "seed": 0}
        about |= {"edit": "all", "count": 0, "width": 0, "penalty": "l2", "labels": "true", "converged": True}
        self.rows.append(about | {"said": " ".join([str(most)] * len(task.rows["test"]))})
        space = self.spaces(task.samples)["features"]
        speakers = task.samples.about["speaker"].to_numpy()[task.rows["train"]]
        for seed in range(self.cfg["shuffles"]):
            rng = np.random.default_rng([self.cfg["seed"], seed, 67])
            moved = probes.permuted(task.codes["train"], speakers, task.by_speaker, rng)
            scores = probes.fisher(space.ranked[task.rows["train"]], moved)
            columns = probes.descending(scores)
            for count in (k for k in self.cfg["kept"] if k <= space.width):
                edit = Edit(space, "kept", columns[:count], count, "fisher", seed)
                about = {"task": task.name, **edit.about(), "labels": "shuffled"}
                self.ask(about, task, edit.left, moved)


def removed_counts(shares: list[float], width: int) -> list[int]:
    """How many columns each share is; at least one goes and one stays."""
    return sorted({min(max(1, round(share * width)), width - 1) for share in shares if width > 1})


def _tasks(
    cache: ActivationCache, labels_h5: str | Path | None, manifest: pd.DataFrame, sae: SAE, cfg: ErasingCfg
) -> list[Task]:
    k = getattr(sae.config, "k", 0) if cfg["selection"] == "clip" else 0
    found = []
    if names := [name for name in sorted(cfg["tasks"]) if name != VOWELS]:
        clips = pooled(cache, sae, all_clips(cache), k)
        found += [clip_task(name, clips, manifest, cfg["seed"]) for name in names]
    if VOWELS in cfg["tasks"]:
        assert labels_h5 is not None  # the rule's input where vowels are a task
        about, codes, vowels = vowel_segments(cache, labels_h5, cfg["vowels"], cfg["segments"], cfg["seed"])
        found += vowel_tasks(pooled(cache, sae, about, k), codes, vowels)
    return found


def _digest(task: Task) -> str:
    arrays = [array for part in PARTS for array in (task.rows[part], task.codes[part])]
    return array_hash(*arrays, task.samples.raw, task.samples.most, task.samples.mean)


def run_sae(
    cache: ActivationCache, tasks: list[Task], sae: SAE, cfg: ErasingCfg, stack: ExitStack, pieces: Pieces
) -> tuple[Bench, pd.DataFrame, dict[str, Any]]:
    """Probes of one SAE, swaps between clips (`eqknobs.stages.erasing.swaps`), and what is to be said of its tasks."""
    bench = Bench(sae, principal_axes(cache), cfg)
    decoder = array_hash(*(part.numpy() for part in (sae.W_dec, sae.b_dec, sae.mean, sae.std)))
    made_of: list[Any] = [
        cfg.get("content", {}).get("code"),
        cache.digest() if pieces.folder else None,
        cfg["c"],
        cfg["seed"],
    ]
    made_of += [decoder, sorted(_digest(task) for task in tasks)]
    bench.pack = stack.enter_context(pieces.pack("erasing", made_of))
    swapped, about = [], {}
    for task in tqdm(tasks, desc="erasing", unit="task"):
        others = [one for one in tasks if one is not task and one.samples is task.samples and not nested(task, one)]
        living = living_features(task.samples)
        orders = bench.curves(task, others)
        moment = second_moment(cache, task.samples.about.iloc[task.rows["train"]])
        taken = bench.erase(task, others, moment)
        bench.nulls(task)
        about[task.name] = {"names": task.names, "others": [one.name for one in others], "living": len(living)}
        about[task.name] |= {part: len(task.rows[part]) for part in PARTS}
        about[task.name] |= {"first": [int(living[j]) for j in orders["features"][:NAMED]]}
        if len(task.samples.about) == task.samples.about["id"].nunique():  # a clip has each label once, but many vowels
            spaces = bench.spaces(task.samples)
            swapped.append(swap_features(task, others, spaces, bench.axes, orders, taken, cfg))
            bench.keys |= {f"swap {task.name}, {one.name}" for one in [task, *others]}
    table = pd.concat(swapped, ignore_index=True) if swapped else pd.DataFrame(columns=SWAP_COLUMNS)
    return bench, table, about


@dataclass(frozen=True)
class Read:
    """Files that the stage reads of a target. labels: only where vowels are a task; saes: name -> folder."""

    manifest: str | Path
    cache: str | Path
    labels: str | Path | None
    saes: Mapping[str, Path]


@dataclass(frozen=True)
class Written:
    """Files that it writes.

    probes: COLUMNS, one row a probe; `said`: places of labels, in the order of the test samples in `clips`: sae, task,
    id, speaker, split, true. swaps: `SWAP_COLUMNS`, one row a (intervention, clip). found: `fits` (probes in all) and
    by SAE and task its values, samples, the other tasks and the first features in Fisher order.
    """

    probes: str | Path
    clips: str | Path
    swaps: str | Path
    found: str | Path


def score_erasing(read: Read, written: Written, cfg: ErasingCfg, pieces: Pieces | None = None) -> None:
    """Probe and erase every task of a target in the features of its SAEs.

    pieces: where what probes say is kept; by default nowhere. Raises EqknobsError: a task that the manifest or the
    labels do not know, or of which a split lacks values; an SAE of input_scale unit_norm, whose codes do not decode.
    """
    manifest = read_csv(read.manifest).set_index("id")
    rows, clips, swaps, found, fits = [], [], [], {}, 0
    with ActivationCache(read.cache) as cache, ExitStack() as stack:
        for name, folder in sorted(read.saes.items()):
            sae = SAE.load(folder)
            tasks = _tasks(cache, read.labels, manifest, sae, cfg)
            bench, swapped, about = run_sae(cache, tasks, sae, cfg, stack, pieces or Pieces(None))
            rows.append(pd.DataFrame(bench.rows).assign(sae=name))
            swaps.append(swapped.assign(sae=name))
            for task in tasks:
                own = task.samples.about.iloc[task.rows["test"]][["id", "speaker"]]
                clips.append(own.assign(sae=name, task=task.name, split="test", true=task.codes["test"]))
            fits += len(bench.keys)
            found[name] = about
    write_csv(written.probes, pd.concat(rows, ignore_index=True)[COLUMNS])
    write_csv(written.clips, pd.concat(clips, ignore_index=True)[["sae", "task", "id", "speaker", "split", "true"]])
    write_csv(written.swaps, pd.concat(swaps, ignore_index=True)[["sae", *SWAP_COLUMNS]])
    write_json(written.found, {"fits": fits, "saes": found})
