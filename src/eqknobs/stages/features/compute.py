"""What single features hear: their strongest moments in the corpus, and the mean sound around the frames they fire on.

Pages of features need, for each: clips where it is strongest, of several speakers; what it fires on, by label; and its
mean mel map, AudioSAE's picture of a feature (arXiv 2602.05027, section 4.2): log-mel windows of one second centred on
active frames of its strongest clips. Any set of frames averages to a smooth picture, so beside it stand as many random
frames of the same clips, and as many on which the feature is off and the level is the same. Whether a feature marks an
onset or an offset is said by the share of the window's energy that lies right of its centre, for all three.

A window counts if the clip holds all of it: where a clip begins or ends says nothing about a feature.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from eqknobs.audio import read_clip, write_flac
from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.properties import COLUMNS
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_csv, read_json, unused_name, write_csv, write_json
from eqknobs.sae import SAE
from eqknobs.sound.mel import mel_power

CELL = 0.02  # seconds a cell of `mel_power`
HALF = 25  # cells either side of a window's centre
FLOOR_DB = 80  # below the clip's loudest band
NEAREST = 5  # frames of the nearest level, of which one is drawn
MOST_VALUES = 12  # of a label; firing by more is no picture
KINDS = ("feature", "random", "matched")
SCORES = "sae feature kind id speaker split frames right".split()
SHOWN = "id speaker split sae feature start seconds peak activation file".split()


class FeaturesCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`)."""

    count: int
    random: int
    min_firings: int
    splits: list[str]
    clips: int
    seconds: float
    map_clips: int
    map_frames: int
    seed: int
    content: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Out:
    """Where `page_features` writes: raw scores (CSV), what is known of each feature (JSON), mean mel maps (npz) and the
    index of the windows, which lie beside it."""

    scores: str | Path
    found: str | Path
    maps: str | Path
    index: str | Path


class Activity(NamedTuple):
    """How each feature fires in each clip.

    peak: largest activation, float32 [clips, m]; fires: frames on which it is on, int64 [clips, m]; clips: id, speaker,
    split, start (its first frame in the cache), frames and row (its place among the cache's utterances).
    """

    peak: np.ndarray
    fires: np.ndarray
    clips: pd.DataFrame


@dataclass(frozen=True)
class Names:
    """What other stages say of an SAE's features; the first of a list is said most surely.

    labels: feature -> {property, label, f1, p} of `label_search`; phones: feature -> phone; domains: feature -> domain;
    twins: feature -> (its best match in the other seed, their overlap χ).
    """

    labels: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    phones: dict[int, str] = field(default_factory=dict)
    domains: dict[int, str] = field(default_factory=dict)
    twins: dict[int, tuple[int, float]] = field(default_factory=dict)


def clip_activity(cache: ActivationCache, sae: SAE, splits: Iterable[str]) -> Activity:
    """How features fire, clip by clip, by the SAE's own rule. Raises EqknobsError if no clip is of these splits."""
    clips = cache.utterances[cache.utterances["split"].isin(list(splits)) & (cache.utterances["frames"] > 0)]
    clips = clips.sort_values("id").rename_axis("row").reset_index()
    if clips.empty:
        raise EqknobsError(f"features: no clips of {', '.join(splits)} in the activation cache; mend features.splits")
    peak, fires = [], []
    for clip in clips.itertuples():
        code = sae.encode(np.array(cache.acts[clip.start : clip.start + clip.frames]))
        peak.append(code.max(0))
        fires.append((code > 0).sum(0))
    return Activity(np.array(peak), np.array(fires), clips)


def choose(activity: Activity, named: dict[str, list[int]], cfg: FeaturesCfg) -> dict[int, str]:
    """feature -> why it has a page, those drawn at random last.

    named: reason -> features in their order; `frequent` (most frames) and `strong` (largest activation) follow. They
    take turns until there are `count`. The random ones are drawn before, of all features that fire often enough, so
    that they stand for these.
    """
    fires = activity.fires.sum(0)
    alive = np.flatnonzero(fires >= cfg["min_firings"])
    drawn = np.random.default_rng([cfg["seed"], 41]).permutation(alive)[: cfg["random"]].tolist()
    lists = {**named, "frequent": np.argsort(-fires, kind="stable").tolist()}
    lists["strong"] = np.argsort(-activity.peak.max(0), kind="stable").tolist()
    taken, living = set(drawn), set(alive.tolist())
    found: dict[int, str] = {}
    queues = [[(j, why) for j in own if j in living and j not in taken] for why, own in lists.items()]
    for turn in zip_longest(*queues):
        for feature, why in (one for one in turn if one is not None):
            if len(found) < cfg["count"] and feature not in found:
                found[feature] = why
        if len(found) >= cfg["count"]:
            break
    return found | dict.fromkeys(drawn, "random")


def strongest_first(peak: np.ndarray, count: int | None = None) -> list[int]:
    """The `count` clips (None: all) in which a feature is strongest, of those where it fires; peak: [clips]."""
    return [int(place) for place in np.argsort(-peak, kind="stable")[:count] if peak[place] > 0]


def top_clips(peak: np.ndarray, speakers: list[str], count: int) -> list[int]:
    """The clips in which a feature is strongest, each of another speaker, the strongest first; peak: [clips]."""
    found: dict[str, int] = {}
    for place in strongest_first(peak):
        if len(found) == count:
            break
        found.setdefault(speakers[place], place)
    return list(found.values())


def strongest_clips(activity: Activity, count: int) -> np.ndarray:
    """`top_clips` of every feature as rows of the cache's utterances, int32 [m, count], −1 where there are fewer."""
    speakers, rows = activity.clips["speaker"].tolist(), activity.clips["row"].to_numpy()
    found = np.full((activity.peak.shape[1], count), -1, np.int32)
    for feature, own in enumerate(found):
        places = top_clips(activity.peak[:, feature], speakers, count)
        own[: len(places)] = rows[places]
    return found


def moment(clip: Any, on: np.ndarray, times: np.ndarray, total: float, seconds: float) -> dict[str, Any]:
    """The window around a feature's peak in a clip, and its activation there.

    clip: its id, speaker and split; on: activations [frames]; times: of the frames, s; total: length of the clip, s.
    """
    peak = int(on.argmax())
    start, end = window(float(times[peak]), total, seconds)
    inside = (times >= start) & (times < end)
    return {
        "id": clip.id,
        "speaker": clip.speaker,
        "split": clip.split,
        "start": round(start, 4),
        "seconds": round(end - start, 4),
        "peak": round(float(times[peak]), 4),
        "activation": float(on[peak]),
        "curve": [[round(float(t - start), 3), round(float(v), 4)] for t, v in zip(times[inside], on[inside])],
    }


def cut(wav: np.ndarray, rate: int, found: dict[str, Any]) -> np.ndarray:
    """The samples of a `moment` of a clip."""
    first = round(found["start"] * rate)
    return wav[first : first + round(found["seconds"] * rate)]


def window(peak: float, total: float, seconds: float) -> tuple[float, float]:
    """(start, end) of a window around a moment, moved so that the clip holds it; all in s."""
    start = max(0.0, min(peak - seconds / 2, total - seconds))
    return start, min(total, start + seconds)


@dataclass
class MelMaps:
    """Sums of log-mel windows [51, 80] in dB above the floor, and how many, of each kind of frames."""

    total: dict[str, np.ndarray] = field(default_factory=lambda: {kind: np.zeros((2 * HALF + 1, 80)) for kind in KINDS})
    frames: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, power: np.ndarray, centres: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """power: mel power of a clip [cells, 80]; centres: kind -> cells; about: of the clip, for `rows`."""
        if not power.max() > 0:
            return
        floor = power.max() * 10 ** (-FLOOR_DB / 10)
        level = 10 * np.log10(np.maximum(power, floor) / floor)
        for kind, cells in centres.items():
            right, frames = 0.0, 0
            for cell in cells:
                own = power[cell - HALF : cell + HALF + 1].sum(1)
                sides = own[:HALF].sum(), own[HALF + 1 :].sum()
                if sum(sides) > 0:
                    right, frames = right + sides[1] / sum(sides), frames + 1
                    self.total[kind] += level[cell - HALF : cell + HALF + 1]
            self.frames[kind] += frames
            if frames:
                self.rows.append({**about, "kind": kind, "frames": frames, "right": float(right)})

    def means(self) -> np.ndarray:
        """Mean window of each kind, bands from the lowest, dB above the floor, float32 [3, 80, 51]; 0 of none."""
        means = [(self.total[kind] / max(self.frames[kind], 1)).T for kind in KINDS]
        return np.array(means, np.float32)


def centres(
    on: np.ndarray, times: np.ndarray, power: np.ndarray, most: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Cells on which windows are centred: a feature's strongest frames in a clip, as many random ones, and as many
    frames on which it is off, each with nearly the level of one of the first.

    on: its activations [frames]; times: of the frames, s; power: mel power [cells, 80]. Fewer where there are no more.
    """
    cells = np.floor(times / CELL).astype(int)
    whole = (cells >= HALF) & (cells + HALF < len(power))
    active = np.flatnonzero(whole & (on > 0))
    active = np.sort(active[np.argsort(-on[active], kind="stable")][:most])
    idle, level = np.flatnonzero(whole & (on <= 0)), np.log10(power.sum(1) + 1e-12)
    matched: list[int] = []
    for frame in active:
        if len(left := np.setdiff1d(idle, matched)):
            near = np.argsort(np.abs(level[cells[left]] - level[cells[frame]]), kind="stable")[:NEAREST]
            matched.append(int(left[rng.choice(near)]))
    random = rng.permutation(np.flatnonzero(whole))[: len(active)]
    found = {"feature": active, "random": np.sort(random), "matched": np.array(sorted(matched), int)}
    return {kind: cells[frames] for kind, frames in found.items()}


def firing_by_label(fires: np.ndarray, clips: pd.DataFrame, columns: dict[str, pd.Series]) -> dict[str, Any]:
    """label -> {value: {rate, clips}}: on what share of the frames of its clips a feature fires; fires: [clips]."""
    found = {}
    for name, values in columns.items():
        own = pd.DataFrame({"fires": fires, "frames": clips["frames"], "value": values.to_numpy(), "clips": 1})
        sums = own.groupby("value")[["fires", "frames", "clips"]].sum()
        found[name] = {
            str(value): {"rate": float(row.fires / row.frames), "clips": int(row.clips)}
            for value, row in sums.iterrows()
        }
    return found


def _labels(clips: pd.DataFrame, manifest: pd.DataFrame) -> dict[str, pd.Series]:
    """What clips are told apart by: their split, and columns of the manifest with a few values."""
    about = manifest.loc[clips["id"]]
    found = {"split": clips["split"]}
    for name in ("domain", *sorted(set(COLUMNS) - {"domain"})):
        if name in about:
            values = about[name].fillna("").astype(str).where(lambda s: s != "", "(none)")
            if 1 < values.nunique() <= MOST_VALUES:
                found[name] = values
    return found


def reasons(names: Names) -> dict[str, list[int]]:
    """reason -> the features that other stages name for it, those said most surely first; empty ones are left out."""
    seen: set[str] = set()
    labelled = []
    for feature, own in sorted(names.labels.items(), key=lambda item: (item[1][0]["p"], -item[1][0]["f1"], item[0])):
        if own[0]["label"] not in seen:
            labelled.append(feature)
            seen.add(own[0]["label"])
    found = {"label": labelled, "phone": _in_turns(names.phones), "domain": _in_turns(names.domains)}
    return {why: features for why, features in found.items() if features}


def _in_turns(named: dict[int, str]) -> list[int]:
    """Features by name in turns: one of each, then the next of each."""
    lists: dict[str, list[int]] = {}
    for feature, name in named.items():
        lists.setdefault(name, []).append(feature)
    return [j for turn in zip_longest(*(lists[name] for name in sorted(lists))) for j in turn if j is not None]


def read_names(
    sae: str,
    label_search: Path | None = None,
    phones: Path | None = None,
    domains: Path | None = None,
    stability: Path | None = None,
) -> Names:
    """What other stages' files say of an SAE's features: `label_search/…json`, `phones/…json`, `scores/….domains.csv`,
    `scores/….stability.csv`; None: the stage is off."""
    labels: dict[int, list[dict[str, Any]]] = {}
    for search in read_json(label_search)["searches"] if label_search else []:
        if search["sae"] == sae:
            about = {"property": search["property"], "label": search["label"]}
            labels.setdefault(search["column"], []).append(about | {"f1": search["f1_test"], "p": search["p"]})
    for own in labels.values():
        own.sort(key=lambda one: (one["p"], -one["f1"]))
    found = read_json(phones)["saes"].get(sae, {}) if phones else {}
    named = dict(zip(found.get("features", []), found.get("phones", []), strict=True))
    return Names(labels, named, _domains(domains, sae), _twins(stability, sae))


def _domains(file: Path | None, sae: str) -> dict[int, str]:
    """feature -> the domain on whose frames it fires most, where it has that label; the clearest first."""
    if file is None:
        return {}
    rows = read_csv(file)
    rows = rows[rows["sae"] == sae]
    share = rows.pivot(index="feature", columns="domain", values="frame_share")
    marks = [column for column in rows if column.startswith("frame_") and column != "frame_share"]
    has = rows.assign(any=rows[marks].astype(bool).any(axis=1)).pivot(index="feature", columns="domain", values="any")
    best, margin = share.idxmax(axis=1), share.max(axis=1) - share.min(axis=1)
    return {int(j): best[j] for j in margin.sort_values(ascending=False, kind="stable").index if has.loc[j, best[j]]}


def _twins(file: Path | None, sae: str) -> dict[int, tuple[int, float]]:
    """feature -> (twin, χ) in the first pair of seeds, which is the first seed's."""
    if file is None:
        return {}
    rows = read_csv(file)
    rows = rows[(rows["kind"] == "seeds") & (rows["sae"] == sae)]
    rows = rows[(rows["a"] == rows["a"].iloc[0]) & (rows["b"] == rows["b"].iloc[0])] if len(rows) else rows
    return {int(row.feature): (int(row.found), float(row.best)) for row in rows.itertuples()}


class _Sounds:
    """Windows of clips as files of a folder, each once, whichever features share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: set[str] = set()
        self.kept: dict[str, str] = {}

    def add(self, found: dict[str, Any], wav: np.ndarray, rate: int) -> str:
        """The file of a `moment` of a clip [samples]."""
        key = f"{found['id']}.{found['start']:.2f}+{found['seconds']:.2f}"
        if key not in self.kept:
            self.kept[key] = unused_name(f"{key}.flac", self.names)
            write_flac(self.folder / self.kept[key], cut(wav, rate, found), rate)
        return self.kept[key]


@dataclass
class _Page:
    """What is gathered for one feature."""

    feature: int
    shown: list[int]  # places of clips
    mapped: set[int]
    rng: np.random.Generator
    maps: MelMaps = field(default_factory=MelMaps)
    clips: dict[int, dict[str, Any]] = field(default_factory=dict)


def _gather(
    cache: ActivationCache,
    sae: SAE,
    manifest: pd.DataFrame,
    activity: Activity,
    chosen: Iterable[int],
    folder: _Sounds,
    cfg: FeaturesCfg,
) -> Iterator[_Page]:
    """The pages of an SAE; each clip is read and encoded once, whoever wants it."""
    speakers = activity.clips["speaker"].tolist()
    pages = []
    for feature in chosen:
        peak = activity.peak[:, feature]
        rng = np.random.default_rng([cfg["seed"], 43, feature])
        mapped = set(strongest_first(peak, cfg["map_clips"]))
        pages.append(_Page(feature, top_clips(peak, speakers, cfg["clips"]), mapped, rng))
    rate = int(cache.attrs["sample_rate"])
    places = sorted({place for page in pages for place in (*page.shown, *page.mapped)})
    for place in tqdm(places, desc="feature pages", unit="clip"):
        clip = activity.clips.iloc[place]
        rows = slice(int(clip.start), int(clip.start + clip.frames))
        code, times = sae.encode(np.array(cache.acts[rows])), cache.frame_times[rows]
        wav = read_clip(manifest.loc[clip.id], rate)
        power = mel_power(torch.from_numpy(wav)[None], rate)[0].numpy().astype(np.float64)
        for page in pages:
            on = code[:, page.feature]
            if place in page.shown:
                found = moment(clip, on, times, len(wav) / rate, cfg["seconds"])
                page.clips[place] = found | {"file": folder.add(found, wav, rate)}
            if place in page.mapped:
                about = {"id": clip.id, "speaker": clip.speaker, "split": clip.split}
                page.maps.add(power, centres(on, times, power, cfg["map_frames"], page.rng), about)
    yield from pages


def _record(page: _Page, why: str, activity: Activity, labels: dict[str, pd.Series], names: Names) -> dict[str, Any]:
    """What is known of a feature, but for its sound."""
    j, fires = page.feature, activity.fires[:, page.feature]
    twin, overlap = names.twins.get(j, (None, None))
    return {
        "feature": j,
        "why": why,
        "rate": float(fires.sum() / activity.clips["frames"].sum()),
        "max": float(activity.peak[:, j].max()),
        "in_clips": int((fires > 0).sum()),
        "clips": [page.clips[place] for place in page.shown],
        "map_frames": page.maps.frames,
        "firing": firing_by_label(fires, activity.clips, labels),
        "labels": names.labels.get(j, []),
        "phone": names.phones.get(j),
        "domain": names.domains.get(j),
        "twin": twin,
        "twin_overlap": overlap,
    }


def page_features(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    sae_dirs: dict[str, Path],
    names: dict[str, Names],
    out: Out,
    cfg: FeaturesCfg,
) -> None:
    """Choose features of a target's SAEs and gather what their pages show.

    names: SAE -> what other stages say. Written are: scores: SCORES, one row a (feature, kind of frames, clip); `right`
    sums, over `frames` windows, the share of energy right of the centre. found: by SAE the features (`_record`), and
    how many there are. maps: by SAE their mean mel maps, float32 [features, 3 (KINDS), 80, 51], and as
    `<sae>.clips` the strongest clips of every feature of the SAE (`strongest_clips`). index: SHOWN, one row a
    (feature, clip). Raises EqknobsError for clips that changed or splits without clips.
    """
    manifest = read_csv(manifest_csv).set_index("id", drop=False)
    scores, shown, found = [], [], {}
    maps: dict[str, Any] = {}
    with ActivationCache(cache_h5) as cache, atomic_path(Path(out.index).parent) as folder:
        folder.mkdir()
        sounds = _Sounds(folder)
        for name, path in sorted(sae_dirs.items()):
            sae = SAE.load(path)
            activity = clip_activity(cache, sae, cfg["splits"])
            chosen = choose(activity, reasons(names[name]), cfg)
            labels = _labels(activity.clips, manifest)
            records, means = [], []
            for page in _gather(cache, sae, manifest, activity, chosen, sounds, cfg):
                about = {"sae": name, "feature": page.feature}
                records.append(_record(page, chosen[page.feature], activity, labels, names[name]))
                means.append(page.maps.means())
                scores += [{**about, **row} for row in page.maps.rows]
                shown += [{**about, **page.clips[place]} for place in page.shown]
            maps[f"{name}.clips"] = strongest_clips(activity, cfg["clips"])
            maps[name] = np.array(means, np.float32).reshape(-1, len(KINDS), 80, 2 * HALF + 1)
            alive = int((activity.fires.sum(0) >= cfg["min_firings"]).sum())
            about = {
                "d_sae": int(activity.peak.shape[1]),
                "alive": alive,
                "features": records,
                "seconds": cfg["seconds"],
            }
            about |= {"clips": len(activity.clips), "frames": int(activity.clips["frames"].sum())}
            found[name] = about | {"speakers": int(activity.clips["speaker"].nunique())}
        write_csv(folder / "index.csv", pd.DataFrame(shown, columns=SHOWN))
    write_csv(out.scores, pd.DataFrame(scores, columns=SCORES))
    with atomic_path(out.maps) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **maps)
    write_json(out.found, {"cell": CELL, "floor_db": FLOOR_DB, "splits": cfg["splits"], "saes": found})
