"""What a sparse code of a codec's pooled latents keeps of the accent, beside what decides that claim.

The procedure is arXiv 2603.18359's (docs/accent.md says what it leaves open and what is done about it): an utterance is
the mean over time of what the codec's decoder gets; TopK SAEs of q × s sizes and sparsities learn those of train; half
of val watches their loss, the other half teaches L1-penalised logistic regressions on their codes (whole; positions
alone; magnitudes alone) and on the vectors themselves; test is told once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler

from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, write_csv, write_json
from eqknobs.models import ModelCfg, load_model
from eqknobs.pieces import Pieces
from eqknobs.stages.accent import coding
from eqknobs.stages.accent.classify import Features, classify
from eqknobs.stages.accent.coding import Cell, SaeCfg
from eqknobs.stages.accent.pooled import DECODER_INPUT, UNQUANTISED, Reader, Reading, pool, sample_frames

RUN_COLUMNS = (
    "task weights site codebooks q s k d_z cell recipe seed features said converged nonzero fvu flat lr padded gini "
    "effective dead".split()
)
SCALARS = ("loudness", "duration")


class CodecCfg(TypedDict):
    """What is read of one model; the rest as for all."""

    codebooks: NotRequired[list[int]]
    grid: NotRequired[int]
    site: NotRequired[str]
    clips: NotRequired[int]
    shuffled: NotRequired[bool]
    ratios: NotRequired[list[float]]
    sparsities: NotRequired[list[float]]
    seeds: NotRequired[int]
    frames: NotRequired[int]


class CellsCfg(TypedDict):
    ratios: list[float]
    sparsities: list[float]


class ReferenceCfg(TypedDict):
    ratio: float
    sparsity: float


class ClassifierCfg(TypedDict):
    c: float
    tuned_c: list[float]
    max_iter: int


class TaskCfg(TypedDict):
    """Labels of the corpus that mean 0, and 1."""

    zero: list[str]
    one: list[str]


class AccentCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`)."""

    model: ModelCfg
    codec: CodecCfg
    tasks: dict[str, TaskCfg]
    seconds: float
    ratios: list[float]
    sparsities: list[float]
    curve: CellsCfg
    equal_k: list[int]
    equal_share: list[float]
    reference: ReferenceCfg
    seeds: int
    frames: int
    sae: SaeCfg
    classifier: ClassifierCfg
    seed: int
    device: NotRequired[str]
    content: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """Rows of half 2 and of test that have one of a task's labels, and those labels as 0 and 1."""

    name: str
    train_rows: np.ndarray
    train: np.ndarray
    test_rows: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Parts:
    """Rows of the manifest: `sae` (train), `watch` (half 1 of val), `fit` (half 2), `test`."""

    sae: np.ndarray
    watch: np.ndarray
    fit: np.ndarray
    test: np.ndarray


def thinned(clips: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """At most so many clips of each split and accent, by a hash of seed and id."""
    keys = [hashlib.sha256(f"{seed}/{name}".encode()).hexdigest() for name in clips["id"]]
    kept = clips.assign(key=keys).sort_values("key").groupby(["split", "accent"]).head(most)
    return kept.drop(columns="key").sort_values("id", ignore_index=True)


def halves(clips: pd.DataFrame, seed: int) -> Parts:
    """Val halved, label by label of `accent`, by seed. Raises EqknobsError where a split is empty."""
    split = clips["split"].to_numpy()
    rows = {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}
    for name, own in rows.items():
        if len(own) < 2:
            raise EqknobsError(f"accent: {len(own)} {name} clips of the tasks' labels; give the corpus more")
    rng = np.random.default_rng([seed, 41])
    watch, fit = [], []
    for label in sorted(set(clips["accent"].iloc[rows["val"]])):
        own = rng.permutation(rows["val"][clips["accent"].iloc[rows["val"]].to_numpy() == label])
        watch.append(own[: len(own) // 2])
        fit.append(own[len(own) // 2 :])
    return Parts(rows["train"], np.sort(np.concatenate(watch)), np.sort(np.concatenate(fit)), rows["test"])


def task_of(name: str, cfg: TaskCfg, clips: pd.DataFrame, parts: Parts) -> Task:
    """Raises EqknobsError where half 2 or test lacks one of the two sides."""
    side = {label: 0 for label in cfg["zero"]} | {label: 1 for label in cfg["one"]}
    labels = clips["accent"].map(side).to_numpy(float)
    found = []
    for what, rows in (("half of val", parts.fit), ("test", parts.test)):
        own = np.flatnonzero(np.isfinite(labels[rows]))
        sides = labels[rows][own].astype(np.int8)
        if len(np.unique(sides)) < 2:
            raise EqknobsError(
                f"accent.tasks.{name}: {what} has clips of one side alone; mend the labels or the splits"
            )
        found += [own, sides]
    return Task(name, *found)


class Bench:
    """One model's run: readings, tasks and the rows that are made of them."""

    def __init__(self, cfg: AccentCfg, clips: pd.DataFrame, pieces: Pieces):
        self.cfg, self.codec = cfg, cfg["codec"]
        wanted = {label for task in cfg["tasks"].values() for label in (*task["zero"], *task["one"])}
        self.clips = clips[clips["accent"].isin(wanted)].sort_values("id", ignore_index=True)
        if most := self.codec.get("clips"):
            self.clips = thinned(self.clips, most, cfg["seed"])
        self.parts = halves(self.clips, cfg["seed"])
        self.tasks = [task_of(name, task, self.clips, self.parts) for name, task in sorted(cfg["tasks"].items())]
        self.pieces = pieces
        self.rows: list[dict[str, Any]] = []
        self.rates: dict[str, Any] = {}
        self.width = 0
        self.device = "cpu"
        self._readers: dict[str, Reader] = {}

    # --- what is read

    def reader(self, weights: str) -> Reader:
        """The model with trained or with shuffled weights."""
        if weights not in self._readers:

            def load() -> Any:
                if weights == "trained":
                    return self.trained
                model = load_model(self.cfg["model"])
                model.shuffle_weights(self.cfg["seed"])
                return model

            site = self.codec.get("site") or next(reversed(self.trained.sites))
            self._readers[weights] = Reader(load, site, self.cfg["seconds"])
        return self._readers[weights]

    @cached_property
    def trained(self) -> Any:
        return load_model(self.cfg["model"])

    def readings(self) -> list[Reading]:
        """The one that the whole grid is made of first; then the other numbers of codebooks, around the quantiser, and
        both with shuffled weights."""
        if not self.trained.decodes:
            return [Reading("trained", self.reader("trained").encoder_site, 0)]
        counts = sorted(self.codec.get("codebooks") or [self.trained.n_codebooks])
        grid = self.codec.get("grid") or counts[-1]
        found = [Reading("trained", DECODER_INPUT, grid)]
        found += [Reading("trained", DECODER_INPUT, count) for count in counts if count != grid]
        found.append(Reading("trained", UNQUANTISED, 0))
        if self.codec.get("shuffled"):
            found += [Reading("shuffled", DECODER_INPUT, grid), Reading("shuffled", UNQUANTISED, 0)]
        return found

    # --- one row

    def tell(
        self, about: dict[str, Any], train: Features, test: Features, seed: int = 0, tasks: list[Task] | None = None
    ) -> None:
        """Classify every task; train and test: features of all clips of half 2 and of test."""
        chosen = self.cfg["classifier"]
        for task in self.tasks if tasks is None else tasks:
            told = classify(
                train[task.train_rows], task.train, test[task.test_rows], chosen["c"], chosen["max_iter"], seed
            )
            self.keep(task, about, told.said, seed, converged=told.converged, nonzero=told.weights)

    def keep(self, task: Task, about: dict[str, Any], said: np.ndarray, seed: int, **more: Any) -> None:
        row = {"task": task.name, "cell": "", "recipe": "", "seed": seed, "converged": True, **about, **more}
        self.rows.append(row | {"said": "".join(map(str, said))})

    # --- what is told from

    def dense(self, reading: Reading, u: np.ndarray) -> None:
        """u itself, its length, the three nulls."""
        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks}
        fit, test = u[self.parts.fit], u[self.parts.test]
        self.tell(about | {"features": "dense"}, fit, test)
        norms = [np.linalg.norm(part, axis=1)[:, None] for part in (fit, test)]
        self.tell(about | {"features": "norm"}, norms[0], norms[1])
        chosen = self.cfg["classifier"]
        for task in self.tasks:
            most = np.full(len(task.test), int(task.train.mean() >= 0.5), np.int8)
            self.keep(task, about | {"features": "constant"}, most, 0)
            for seed in range(self.seeds):
                rng = np.random.default_rng([self.cfg["seed"], seed, 43])
                guess = (rng.random(len(task.test)) < task.train.mean()).astype(np.int8)
                self.keep(task, about | {"features": "stratified"}, guess, seed)
                moved = rng.permutation(task.train)
                told = classify(
                    fit[task.train_rows], moved, test[task.test_rows], chosen["c"], chosen["max_iter"], seed
                )
                found = {"converged": told.converged, "nonzero": told.weights}
                self.keep(task, about | {"features": "shuffled"}, told.said, seed, **found)

    def scalars(self, reading: Reading, table: pd.DataFrame) -> None:
        """Loudness and duration alone, which no codec has to tell."""
        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks}
        for name in SCALARS:
            values = table[[name]].to_numpy()
            self.tell(about | {"features": name}, values[self.parts.fit], values[self.parts.test])

    def tuned(self, reading: Reading, u: np.ndarray) -> None:
        """u with C chosen on the last third of half 2, and the densest classifier with k weights or fewer."""
        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks}
        chosen, fit, test = self.cfg["classifier"], u[self.parts.fit], u[self.parts.test]
        for task in self.tasks:
            x, y = fit[task.train_rows], task.train
            held = np.random.default_rng([self.cfg["seed"], 47]).permutation(len(y)) < len(y) // 3
            tried = []
            for c in sorted(chosen["tuned_c"]):
                told = classify(x[~held], y[~held], x[held], c, chosen["max_iter"], 0)
                tried.append((-float((told.said == y[held]).mean()), c))
            told = classify(x, y, test[task.test_rows], min(tried)[1], chosen["max_iter"], 0)
            found = {"converged": told.converged, "nonzero": told.weights}
            self.keep(task, about | {"features": "dense", "recipe": "tuned"}, told.said, 0, **found)

    def sparse_weights(self, reading: Reading, u: np.ndarray, cells: list[Cell]) -> None:
        """L1-penalised classifiers of u with at most k weights, C as large as that allows."""
        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks, "features": "l1"}
        limit = self.cfg["classifier"]["max_iter"]
        for task in self.tasks:
            x, test = u[self.parts.fit][task.train_rows], u[self.parts.test][task.test_rows]
            path = [classify(x, task.train, test, c, limit, 0) for c in np.geomspace(0.01, 1, 9)]
            for k in sorted({cell.k for cell in cells}):
                fitting = [told for told in path if told.weights <= k] or path[:1]
                found = {"converged": fitting[-1].converged, "nonzero": fitting[-1].weights, "k": k}
                self.keep(task, about, fitting[-1].said, 0, **found)

    def sae(self, reading: Reading, u: np.ndarray, cell: Cell, seed: int, recipe: str = "paper") -> None:
        """One SAE, trained; its codes, their positions and their magnitudes."""
        u = coding.layer_norm(u) if recipe == "openai" else u
        train, watch = u[self.parts.sae], u[self.parts.watch]
        lrs = self.cfg["sae"]["tuned_lr"] if recipe == "tuned" else [self.cfg["sae"]["lr"]]
        tried = []
        for lr in sorted(lrs):
            trainer = coding.new_trainer(train, cell, self.cfg["sae"], seed, lr, recipe == "openai", self.device)
            tried.append((coding.train(trainer, train, watch), trainer))
        found, trainer = min(tried, key=lambda pair: pair[0]["loss"])
        self.codes(reading, u, cell, seed, recipe, trainer.sae, found)

    def codes(
        self, reading: Reading, u: np.ndarray, cell: Cell, seed: int, recipe: str, sae: Any, found: dict[str, Any]
    ) -> None:
        fit, test = (coding.codes_of(sae, u[rows]) for rows in (self.parts.fit, self.parts.test))
        dense = coding.density(test)
        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks}
        about |= {"q": cell.q, "s": cell.s, "k": cell.k, "d_z": fit.shape[1], "cell": cell.kind, "recipe": recipe}
        about |= {"fvu": coding.fvu(sae, u[self.parts.test]), "flat": found.get("flat"), "lr": found.get("lr")}
        evenly = {name: dense[name] for name in ("gini", "effective", "dead")}
        if recipe == "random":
            self.tell(about | {"features": "random_topk", **evenly}, fit, test, seed)
            return
        self.tell(about | {"features": "full", **evenly}, fit, test, seed)
        self.tell(about | {"features": "position"}, coding.positions(fit), coding.positions(test), seed)
        kept, padded = zip(*(coding.magnitudes(part, cell.k) for part in (fit, test)), strict=True)
        self.tell(about | {"features": "magnitude", "padded": padded[1]}, kept[0], kept[1], seed)
        if (seed, recipe, cell.kind) == (0, "paper", "grid") and reading == self.main:
            self.rates[f"{cell.q:g} {cell.s:g}"] = dense["rates"]

    def baselines(self, reading: Reading, u: np.ndarray, cell: Cell) -> None:
        """A random encoder of the same size, k principal components, the k largest entries of u."""
        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks}
        about |= {"s": cell.s, "k": cell.k, "cell": cell.kind}
        train = u[self.parts.sae]
        for seed in range(self.seeds):
            sae = coding.new_trainer(train, cell, self.cfg["sae"], seed, device=self.device).sae
            self.codes(reading, u, cell, seed, "random", sae, {})
        fit, test = u[self.parts.fit], u[self.parts.test]
        if components := coding.principal(train, cell.k):
            left = test - components.inverse_transform(components.transform(test))
            fvu = float((left**2).sum() / ((test - test.mean(0)) ** 2).sum())
            self.tell(about | {"features": "pca", "fvu": fvu}, components.transform(fit), components.transform(test))
        scaled = StandardScaler().fit(train)
        top = [coding.top_of(scaled.transform(part).astype(np.float32), cell.k) for part in (fit, test)]
        self.tell(about | {"features": "top_k"}, *top)

    def of_frames(self, reading: Reading, cell: Cell) -> None:
        """An SAE of frames, whose codes are averaged over time, where the others code the average."""
        reader = self.reader(reading.weights)
        order = np.random.default_rng([self.cfg["seed"], 53]).permutation(self.parts.sae)
        frames = sample_frames(reader, self.clips.iloc[order], reading, self.frames)
        watched = sample_frames(reader, self.clips.iloc[self.parts.watch], reading, max(1, self.frames // 8))
        trainer = coding.new_trainer(frames, cell, self.cfg["sae"], 0, device=self.device)
        found = coding.train(trainer, frames, watched)

        def told(rows: np.ndarray) -> Any:
            wavs = (reader.wav(clip) for clip in self.clips.iloc[rows].itertuples())
            return coding.pooled_codes(trainer.sae, (next(reader.frames(wav, [reading])) for wav in wavs))

        about = {"weights": reading.weights, "site": reading.site, "codebooks": reading.codebooks}
        about |= {"q": cell.q, "s": cell.s, "k": cell.k, "d_z": trainer.config.d_sae, "cell": cell.kind}
        about |= {"recipe": "frames", "fvu": coding.fvu(trainer.sae, watched), "flat": found["flat"]}
        fit, test = told(self.parts.fit), told(self.parts.test)
        self.tell(about | {"features": "frames", "lr": found["lr"]}, fit, test)

    # --- all of it

    @cached_property
    def main(self) -> Reading:
        """The reading that the whole grid and every control are made of."""
        return self.readings()[0]

    @property
    def seeds(self) -> int:
        return self.codec.get("seeds", self.cfg["seeds"])

    @property
    def frames(self) -> int:
        return self.codec.get("frames", self.cfg["frames"])

    def cells(self, d: int) -> tuple[list[Cell], list[Cell], list[Cell], Cell]:
        """The grid, the cells of the curve, those of equal k and k / d_z, and the one of reference."""
        cfg, reference = self.cfg, self.cfg["reference"]
        grid = coding.grid_cells(
            d, self.codec.get("ratios", cfg["ratios"]), self.codec.get("sparsities", cfg["sparsities"])
        )
        curve = coding.grid_cells(d, cfg["curve"]["ratios"], cfg["curve"]["sparsities"])
        equal = coding.equal_cells(d, reference["ratio"], cfg["equal_k"], cfg["equal_share"])
        return grid, curve, equal, coding.grid_cells(d, [reference["ratio"]], [reference["sparsity"]])[0]

    def runs(self) -> Iterator[tuple[Reading, np.ndarray, pd.DataFrame]]:
        """Readings, pooled: one pass over the clips for each kind of weights."""
        readings = self.readings()
        for weights in dict.fromkeys(reading.weights for reading in readings):
            own = [reading for reading in readings if reading.weights == weights]
            made_of = [weights, self.cfg["seed"]] if weights == "shuffled" else [weights]
            pooled, table = pool(self.reader(weights), self.clips, own, self.pieces.within(made_of))
            for reading in own:
                yield reading, pooled[reading], table

    def run(self) -> None:
        for reading, u, table in self.runs():
            grid, curve, equal, reference = self.cells(u.shape[1])
            self.width = u.shape[1]
            self.dense(reading, u)
            for cell in grid + equal if reading == self.main else curve:
                for seed in range(self.seeds):
                    self.sae(reading, u, cell, seed)
            if reading != self.main:
                continue
            self.scalars(reading, table)
            self.tuned(reading, u)
            self.sparse_weights(reading, u, curve + equal)
            for cell in curve:
                self.baselines(reading, u, cell)
            for recipe in ("tuned", "openai"):
                for seed in range(self.seeds):
                    self.sae(reading, u, replace(reference, kind="reference"), seed, recipe)
            if self.frames:
                self.of_frames(reading, replace(reference, kind="reference"))


def score_accent(
    manifest_csv: str | Path,
    out_runs: str | Path,
    out_clips: str | Path,
    out_json: str | Path,
    cfg: AccentCfg,
    pieces: Pieces | None = None,
) -> None:
    """Everything of one model.

    out_runs: `RUN_COLUMNS`, one row a classifier; `said`: what it told of each test clip of the task, 0 or 1, in the
    order of out_clips: task, id, speaker, split, true. out_json: `clips` (how many of train, of each half of val, of
    test), `fitted` (clips of either side that teach each task), `d`, `rates` (cell -> firing rates). Raises
    EqknobsError: labels that a split lacks, a model or a site that is not there, sound that changed.
    """
    bench = Bench(cfg, read_csv(manifest_csv), pieces or Pieces(None))
    bench.run()
    write_csv(out_runs, pd.DataFrame(bench.rows, columns=RUN_COLUMNS))
    told = []
    for task in bench.tasks:
        own = bench.clips.iloc[bench.parts.test[task.test_rows]][["id", "speaker", "split"]]
        told.append(own.assign(task=task.name, true=task.test))
    write_csv(out_clips, pd.concat(told, ignore_index=True)[["task", "id", "speaker", "split", "true"]])
    counts = {name: len(rows) for name, rows in vars(bench.parts).items()}
    fitted = {task.name: [int((task.train == side).sum()) for side in (0, 1)] for task in bench.tasks}
    write_json(out_json, {"clips": counts, "fitted": fitted, "d": bench.width, "rates": bench.rates})
