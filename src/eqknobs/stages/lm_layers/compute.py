"""What can be read linearly from every layer and every attention head of a speech LM, and from what it was given.

The probes of all layers at all lags, and those of all heads, are fitted as batches (`batched`). Beside every layer: the
summed code embeddings that the first one reads, log-mel spectra, the same layer of a random network, the majority class
and shuffled labels.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.properties import PROPERTIES
from eqknobs.device import gpu_lock, pick_device
from eqknobs.io import read_csv, write_csv
from eqknobs.stages.lm_layers.batched import blocks, scored, told_right
from eqknobs.stages.lm_layers.ranking import ACOUSTIC, HALVES, SEMANTIC, accuracies, pruning_order
from eqknobs.stages.lm_layers.turns import STREAMS, read_index
from eqknobs.stages.probes.compute import LabelledFrames, ProbesCfg, Sources, ask

BOTH = "both"  # the stream of what is asked of user and agent together
WHO = "who"
BINNING = "quantile"  # of a property that is no category


class LmLayersCfg(TypedDict):
    """properties: of `eqknobs.corpus.properties`; bins: classes of those that are no category; lags: frames."""

    properties: list[str]
    bins: int
    lags: list[int]
    seed: int
    device: NotRequired[str]
    content: NotRequired[dict[str, str]]


@dataclass
class Asked:
    """One property of one stream: its frames and their classes, and what each matrix tells of them at each lag."""

    stream: str
    name: str
    frames: LabelledFrames
    labels: np.ndarray  # int [n]
    shuffled: np.ndarray
    classes: int
    lags: list[int]
    right: dict[tuple[str, int, str], np.ndarray] = field(default_factory=dict)  # (labels, lag, matrix) -> bool

    def part(self, positions: np.ndarray) -> "Asked":
        """The same of some frames."""
        frames, labels, shuffled = self.frames.at(positions), self.labels[positions], self.shuffled[positions]
        return Asked(self.stream, self.name, frames, labels, shuffled, self.classes, self.lags)

    def fit(self, names: list[str], matrices: Tensor, lags: list[int], labels: str = "true") -> None:
        """Probes of matrices [G, N, width] at lags: the activation of frame t with the label of frame t + lag."""
        said = self.labels if labels == "true" else self.shuffled
        for lag in lags:
            rows = torch.from_numpy(self.frames.rows - lag).to(matrices.device)
            found = told_right(matrices.index_select(1, rows), said, self.labels, self.classes, self.frames)
            self.right |= {(labels, lag, name): right for name, right in zip(names, found, strict=True)}

    def counts(self, table: pd.DataFrame, labels: str, lag: int) -> pd.DataFrame:
        """id (of the clip), speaker, split, frames, `majority` and the frames that each matrix tells right."""
        places, chosen = scored(self.frames), self.frames.of("train")
        most = np.bincount(self.labels[chosen], minlength=self.classes).argmax()
        found = {"frames": np.ones(len(places), int), "majority": (self.labels[places] == most).astype(int)}
        found |= {
            name: right.astype(int) for (kind, at, name), right in self.right.items() if (kind, at) == (labels, lag)
        }
        turns = table.iloc[self.frames.utterance[places]]
        rows = pd.DataFrame({key: turns[key].to_numpy() for key in ("clip", "speaker", "split")} | found)
        sums = (
            rows.groupby(["clip", "speaker", "split"], as_index=False, sort=True).sum().rename(columns={"clip": "id"})
        )
        about = {"stream": self.stream, "property": self.name, "labels": labels, "lag": lag}
        return pd.concat([sums[["id", "speaker", "split"]], sums.iloc[:, 3:].assign(**about)], axis=1)


class Turns:
    """The caches of a model's sites, opened, with what is asked of their frames."""

    def __init__(self, turns_csv: str | Path, index_json: str | Path, labels_h5: str | Path, cfg: LmLayersCfg):
        index = read_index(index_json)
        self.caches, self.heads = index["caches"], index["heads"]
        self.cfg, self.labels_h5, self.turns_csv = cfg, labels_h5, turns_csv
        self.cache = self.caches["trained"]["embeddings"]
        with ActivationCache(self.cache) as cache:
            turns = read_csv(turns_csv).set_index("id")
            self.table = cache.utterances.join(turns[["clip", "stream"]], on="id")
            self.rows = len(cache.acts)
            self.asked = [
                self._ask(cache, stream, name)
                for name in cfg["properties"]
                for stream in ([BOTH] if name == WHO else STREAMS)
            ]

    def _ask(self, cache: ActivationCache, stream: str, name: str) -> Asked:
        lags = [0] if PROPERTIES[name].level == "clip" else self.cfg["lags"]
        turns = np.flatnonzero((self.table["stream"] == stream) | (stream == BOTH))
        asks = {"property": name, "bins": self.cfg["bins"], "seed": self.cfg["seed"]}
        settings = cast(ProbesCfg, asks)  # how softmax probes are fitted is not asked here
        found = ask(cache, Sources(self.cache, self.labels_h5, manifest=self.turns_csv), settings, lags, turns)
        at = 0 if found.unordered else found.binnings.index(BINNING)
        labels = found.classes[:, at], found.shuffled[:, at]
        return Asked(stream, name, found.frames, *labels, found.sizes[at], lags)

    def of(self, stream: str, name: str) -> Asked:
        return next(asked for asked in self.asked if (asked.stream, asked.name) == (stream, name))

    def matrices(
        self, network: str, sites: list[str], device: str, parts: int = 1
    ) -> Iterator[tuple[list[str], Tensor]]:
        """(sites, float32 [sites · parts, N, width / parts]) in blocks, z-scored by each cache's train frames."""
        with ExitStack() as stack:
            caches = {site: stack.enter_context(ActivationCache(self.caches[network][site])) for site in sites}
            width = len(next(iter(caches.values())).mean)
            for block in blocks(sites, self.rows, width):
                found = [((caches[s].acts - caches[s].mean) / caches[s].std).astype(np.float32) for s in block]
                stacked = torch.from_numpy(np.stack(found)).to(device)
                yield block, stacked.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)

    def logmel(self, device: str) -> Tensor:
        """Log-mel frames [1, N, bands], z-scored by train frames."""
        with h5py.File(self.labels_h5, "r", locking=False) as file:
            values = file["logmel"][:]
        train = np.repeat((self.table["split"] == "train").to_numpy(), self.table["frames"])
        scaled = (values - values[train].mean(0)) / np.maximum(values[train].std(0), 1e-6)
        return torch.from_numpy(scaled.astype(np.float32)).to(device)[None]


def probe_layers(
    turns_csv: str | Path,
    index_json: str | Path,
    labels_h5: str | Path,
    out_layers_csv: str | Path,
    out_clips_csv: str | Path,
    out_heads_csv: str | Path,
    cfg: LmLayersCfg,
) -> None:
    """Probe all layers for all properties, and all heads for the acoustic and the semantic one (`ranking`).

    out_layers_csv, one row a clip: id, speaker, split, frames, and of these told right by `majority`, `logmel`,
    `embeddings`, `residual.<i>`, `random.residual.<i>`; stream (user, agent or both), property, labels (true; shuffled
    at lag 0), lag. out_clips_csv: likewise with a column `<layer>.<head>` a head, and `half` (all clips, or a and b:
    probes fitted on every other clip and scored on every other). out_heads_csv: see `ranking.pruning_order`.
    Raises EqknobsError as `ask`.
    """
    device = pick_device(cfg.get("device") or "cpu")
    with gpu_lock(device):
        turns = Turns(turns_csv, index_json, labels_h5, cfg)
        _fit_layers(turns, device)
        found = [
            asked.counts(turns.table, labels, lag)
            for asked in turns.asked
            for labels, lags in (("true", asked.lags), ("shuffled", [0]))
            for lag in lags
        ]
        write_csv(out_layers_csv, pd.concat(found, ignore_index=True))
        clips = _fit_heads(turns, device)
    write_csv(out_clips_csv, clips)
    write_csv(out_heads_csv, pruning_order(clips))


def _fit_layers(turns: Turns, device: str) -> None:
    trained = [site for site in turns.caches["trained"] if not site.startswith("heads")]
    sources = [("trained", "", trained), ("random", "random.", list(turns.caches["random"]))]
    for network, prefix, sites in sources:
        for block, matrices in turns.matrices(network, sites, device):
            for asked in tqdm(turns.asked, desc=f"layers, {network}", unit="question"):
                names = [f"{prefix}{site}" for site in block]
                asked.fit(names, matrices, asked.lags)
                asked.fit(names, matrices, [0], "shuffled")
    logmel = turns.logmel(device)
    for asked in turns.asked:
        asked.fit(["logmel"], logmel, asked.lags)
        asked.fit(["logmel"], logmel, [0], "shuffled")


def _best_lag(asked: Asked, table: pd.DataFrame) -> int:
    """The lag at which the layers together tell most val frames right; of equals the one nearest 0."""
    found = {}
    for lag in sorted(asked.lags, key=lambda lag: (abs(lag), lag)):
        rows = asked.counts(table, "true", lag)
        found[lag] = accuracies(rows[rows["split"] == "val"], [c for c in rows if c.startswith("residual.")]).mean()
    return max(found, key=lambda lag: found[lag])


def _fit_heads(turns: Turns, device: str) -> pd.DataFrame:
    """Counts by clip of the probes of all heads, on all clips and on either half of them."""
    whole = [asked for asked in turns.asked if asked.name in (ACOUSTIC, SEMANTIC)]
    clips = turns.table.groupby("split")["clip"].rank("dense").to_numpy().astype(int)
    runs = [
        (half, asked.part(np.flatnonzero(in_half[asked.frames.utterance])), _best_lag(asked, turns.table))
        for asked in whole
        for half, in_half in (("all", clips > 0), *((half, clips % 2 == i) for i, half in enumerate(HALVES)))
    ]
    for count in sorted({len(left) for left in turns.heads} - {0}):  # layers with as many heads left are as wide
        sites = {f"heads.{layer}": layer for layer, left in enumerate(turns.heads) if len(left) == count}
        for block, matrices in turns.matrices("trained", list(sites), device, count):
            names = [f"{sites[site]}.{head}" for site in block for head in turns.heads[sites[site]]]
            for half, asked, lag in runs:
                asked.fit(names, matrices, [lag])
                if half == "all":
                    asked.fit(names, matrices, [lag], "shuffled")
    found = []
    for half, asked, lag in runs:
        for labels in ("true", "shuffled") if half == "all" else ("true",):
            found.append(asked.counts(turns.table, labels, lag).assign(half=half))
    return pd.concat(found, ignore_index=True)
