from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import eqknobs.stages.probes.compute as probes
import eqknobs.stages.probes.spaces as spaces_module
from eqknobs.corpus.activations import kept_frames
from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import write_csv
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE, make_config, new_sae
from eqknobs.stages.probes.compute import Outputs, Sources, bin_edges, fit_probes, load_probe, to_classes
from eqknobs.stages.probes.spaces import make_spaces, top_k
from helpers.synthetic import write_cache, write_labels

D, FRAMES, LAG = 16, 70, 1
CFG = {"seed": 0, "bins": 20, "lags": [-2, -1, 0, 1, 2], "l2": [0.001, 0.1], "device": "cpu"}
SPEAKERS = ["train"] * 8 + ["val"] * 3 + ["test"] * 4
UTTERANCES = [(f"{i:02d}-{u}", f"{i:02d}", split, FRAMES) for i, split in enumerate(SPEAKERS) for u in range(4)]
COUNT = FRAMES * len(UTTERANCES)


class World:
    """A cache whose latents carry the centroid (one frame late) and the pitch linearly, and know nothing of RMS."""

    def __init__(self, folder: Path):
        self.folder, rng = folder, np.random.default_rng(0)
        acts = rng.standard_normal((COUNT, D)) * np.linspace(0.5, 3, D) + np.linspace(-4, 4, D)
        v = rng.standard_normal(D) / np.linspace(0.5, 3, D) / 4
        centroid = 1500 + 300 * np.roll((acts - acts.mean(0)) @ v, LAG) + 10 * rng.standard_normal(COUNT)
        pitch = 150 * np.exp2(0.4 * (acts - acts.mean(0)) @ v)
        self.labels = {
            "centroid": centroid,
            "rms": rng.normal(-30, 5, COUNT),
            "energetic": rng.random(COUNT) < 0.9,
            "voiced": rng.random(COUNT) < 0.6,
        }
        self.labels["pitch"] = np.where(self.labels["voiced"], pitch, np.nan)
        # Mel band 0 is the centroid itself: a ceiling that needs no lag.
        self.logmel = np.column_stack([centroid / 100, rng.standard_normal((COUNT, 7))])
        self.cache = write_cache(folder / "cache.h5", acts, UTTERANCES)
        self.acts = acts
        self.saes = {}
        with ActivationCache(self.cache) as cache:
            for name, variant in (
                ("dense", {"variant": "rms_l1", "l1": 0.0, "l1_on": "h"}),
                ("sparse", {"variant": "topk", "k": 3}),
            ):
                new_sae(make_config({"d_in": D, "d_sae": 48} | variant), cache.mean, cache.std).save(folder / name)
                self.saes[name] = folder / name

    def fit(self, name: str, tag: str, logmel: np.ndarray | None = None, epochs: int = 25, **changes) -> "Fitted":
        logmel = self.logmel if logmel is None else logmel
        labels = write_labels(self.folder / f"{tag}.labels.h5", logmel, **(self.labels | changes))
        return self.fit_labelled(name, tag, labels, epochs)

    def fit_labelled(self, name: str, tag: str, labels: Path, epochs: int = 25, cfg: dict | None = None, **more):
        paths = [self.folder / f"{tag}.{end}" for end in ("npz", "scores.csv", "ridge.csv")]
        sources = Sources(self.cache, labels, more.pop("saes", self.saes), more.pop("manifest", None))
        asked = {"property": name, "epochs": epochs} | ({"parts": more.pop("parts")} if "parts" in more else {})
        fit_probes(sources, Outputs(*paths), CFG | asked | (cfg or {}), **more)
        return Fitted(labels, *paths)

    def manifest(self, **columns: list[str]) -> Path:
        """A manifest of the cache's clips with these columns, a value for each speaker in turn."""
        clips = pd.DataFrame({"id": [u[0] for u in UTTERANCES], "speaker": [u[1] for u in UTTERANCES]})
        for column, values in columns.items():
            clips[column] = [values[int(speaker)] for speaker in clips["speaker"]]
        path = self.folder / "manifest.csv"
        write_csv(path, clips)
        return path


class Fitted:
    def __init__(self, labels: Path, npz: Path, scores: Path, ridge: Path):
        self.labels, self.npz, self.paths = labels, npz, (npz, scores, ridge)
        dtype = {"id": str, "speaker": str}
        self.scores, self.ridge = pd.read_csv(scores, dtype=dtype), pd.read_csv(ridge, dtype=dtype)
        with np.load(npz) as file:
            self.arrays = dict(file)

    def rows(self, space: str, binning: str = "quantile", labels: str = "true", split: str = "test") -> pd.DataFrame:
        s = self.scores
        same = (s["space"] == space) & (s["binning"] == binning) & (s["labels"] == labels) & (s["split"] == split)
        return s[same]

    def accuracy(self, *args: str, column: str = "correct") -> float:
        rows = self.rows(*args)
        return rows[column].sum() / rows["frames"].sum()

    def r2(self, space: str) -> float:
        rows = self.ridge[(self.ridge["space"] == space) & (self.ridge["split"] == "test")]
        sums = rows[["frames", "sum_y", "sum_yy", "sse"]].sum()
        return 1 - sums["sse"] / (sums["sum_yy"] - sums["sum_y"] ** 2 / sums["frames"])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module")
def centroid(world) -> Fitted:
    return world.fit("centroid", "centroid")


@pytest.fixture(scope="module")
def pitch(world) -> Fitted:
    return world.fit("pitch", "pitch")


def test_a_planted_property_is_found_and_shuffled_labels_are_at_chance(centroid):
    for space in ("raw", "pca_d", "logmel"):
        assert centroid.accuracy(space) > 0.3
        assert centroid.accuracy(space, "quantile", "true", "test", column="within_one") > 0.7
        assert centroid.r2(space) > 0.95
        for split in ("val", "test"):
            assert abs(centroid.accuracy(space, "quantile", "shuffled", split) - 0.05) < 0.03
    # An untrained dictionary of three active features keeps some of it, less than the latents it was made from.
    assert 0.07 < centroid.accuracy("sae:sparse") < centroid.accuracy("raw") - 0.1
    assert set(centroid.scores["space"]) == {
        *("raw", "pca_l0", "pca_d", "random_topk", "sae:dense", "sae:sparse", "logmel", "majority")
    }


def test_a_property_the_latents_do_not_carry_is_not_found(world):
    noise = world.fit("rms", "rms", epochs=6)
    for space in ("raw", "sae:dense", "random_topk"):
        assert abs(noise.accuracy(space) - 0.05) < 0.03
        assert noise.r2(space) < 0.05


def test_the_lag_sweep_finds_the_planted_lag(centroid, pitch):
    assert centroid.arrays["lag:raw"] == LAG and centroid.arrays["lag:pca_d"] == LAG
    assert centroid.arrays["lag:logmel"] == 0
    assert pitch.arrays["lag:raw"] == 0 and pitch.r2("raw") > 0.9
    assert set(centroid.ridge.loc[centroid.ridge["space"] == "raw", "lag"]) == {LAG}


def test_test_labels_cannot_leak(world, centroid):
    """With other labels on test (and other log-mel there) everything fitted keeps its bytes; only test scores move."""
    splits = np.repeat([split for _, _, split, _ in UTTERANCES], FRAMES)
    rng = np.random.default_rng(5)
    changed = np.where(splits == "test", rng.uniform(0, 9000, COUNT), world.labels["centroid"])
    logmel = np.where((splits == "test")[:, None], rng.standard_normal((COUNT, 8)), world.logmel)
    other = world.fit("centroid", "leak", logmel, centroid=changed)
    assert other.npz.read_bytes() == centroid.npz.read_bytes()
    assert other.accuracy("raw", "quantile", "true", "val") == centroid.accuracy("raw", "quantile", "true", "val")
    assert other.accuracy("raw") < 0.1 < centroid.accuracy("raw")
    # Edges do not even see val; the choice of epoch and l2 does.
    changed = np.where(splits == "val", rng.uniform(0, 9000, COUNT), world.labels["centroid"])
    other = world.fit("centroid", "leak", epochs=1, centroid=changed)
    for binning in ("equal_width", "quantile"):
        assert np.array_equal(other.arrays[f"edges:{binning}"], centroid.arrays[f"edges:{binning}"])
    train = world.labels["centroid"].astype(np.float32)[(splits == "train") & world.labels["energetic"]]
    edges = centroid.arrays["edges:equal_width"]
    assert train.min() <= edges[0] and edges[-1] <= train.max()


def test_equal_input_gives_equal_bytes(world, centroid):
    again = world.fit("centroid", "again")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in centroid.paths]


def expected_frames(world: World, mask: str, split: str) -> np.ndarray:
    """Rows of the mask two frames away from the ends of their utterance."""
    place = np.arange(COUNT) % FRAMES
    splits = np.repeat([s for _, _, s, _ in UTTERANCES], FRAMES)
    return np.flatnonzero(world.labels[mask] & (place >= 2) & (place < FRAMES - 2) & (splits == split))


def test_every_space_is_judged_on_the_same_frames(world, centroid, pitch):
    for fitted, mask in ((centroid, "energetic"), (pitch, "voiced")):
        scores = fitted.scores
        assert set(scores["split"]) == {"val", "test"}
        assert (scores["correct"] <= scores["within_one"]).all()
        assert (scores["within_one"] <= scores["frames"]).all()
        for split in ("val", "test"):
            frames = len(expected_frames(world, mask, split))
            here = scores[scores["split"] == split]
            assert set(here.groupby(["space", "binning", "labels"])["frames"].sum()) == {frames}
            ridge = fitted.ridge[fitted.ridge["split"] == split]
            assert set(ridge.groupby("space")["frames"].sum()) == {frames}
        per_class = scores.groupby(["binning", "id", "class", "space", "labels"])["frames"].sum()
        assert per_class.groupby(["binning", "id", "class"]).nunique().max() == 1
    assert set(pitch.scores["binning"]) == {"equal_width", "quantile", "semitone"}


@pytest.mark.parametrize("space", ["raw", "sae:sparse", "random_topk", "logmel"])
def test_saved_weights_act_on_the_features_of_the_space(world, centroid, space):
    """The score of an utterance can be recomputed from the npz and `Space.features` alone."""
    rows = expected_frames(world, "energetic", "test")
    with ActivationCache(world.cache) as cache:
        features = make_spaces(cache, world.saes, 0, centroid.labels)[space]
        x = features.features(np.array(features.source[rows - centroid.arrays[f"lag:{space}"]]))
    values = world.labels["centroid"].astype(np.float32)[rows]
    W, b = load_probe(centroid.npz, space, "quantile")
    truth = to_classes(values, centroid.arrays["edges:quantile"])
    correct = (x @ W.T + b).argmax(1) == truth
    assert abs(correct.sum() - centroid.rows(space)["correct"].sum()) <= 1  # one tie may round the other way
    predicted = x @ centroid.arrays[f"ridge:{space}:w"] + centroid.arrays[f"ridge:{space}:b"]
    sse = centroid.ridge[(centroid.ridge["space"] == space) & (centroid.ridge["split"] == "test")]["sse"].sum()
    assert ((values - predicted) ** 2).sum() == pytest.approx(sse, rel=1e-4)


def test_ridge_is_the_closed_form(world, centroid):
    from sklearn.linear_model import Ridge

    frames = expected_frames(world, "energetic", "train")
    y = world.labels["centroid"].astype(np.float32)[frames].astype(float)
    x = world.acts[frames - LAG].astype(np.float32).astype(float)
    z = (x - x.mean(0)) / x.std(0)  # the raw space is z-scored, so one scale is nearly every feature's
    model = Ridge(alpha=0.001 * len(y)).fit(z, y)
    w = centroid.arrays["ridge:raw:w"]
    assert w == pytest.approx(model.coef_, rel=0.02, abs=0.01 * np.abs(w).max())


def test_the_majority_baseline(world, pitch):
    edges = pitch.arrays["edges:equal_width"]
    values = world.labels["pitch"].astype(np.float32)
    most = np.bincount(to_classes(values[expected_frames(world, "voiced", "train")], edges)).argmax()
    truth = to_classes(values[expected_frames(world, "voiced", "test")], edges)
    rows = pitch.rows("majority", "equal_width", "majority")
    assert rows["correct"].sum() == (truth == most).sum() > 0
    assert rows["within_one"].sum() == (np.abs(truth - most) <= 1).sum()
    assert pitch.accuracy("raw", "equal_width") > 1.5 * pitch.accuracy("majority", "equal_width", "majority")


def test_bin_edges():
    values = np.array([0.0, 1, 2, 10])
    assert bin_edges(values, "equal_width", 5) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert to_classes(np.array([-5, 0, 1.9, 2, 9, 10, 99]), bin_edges(values, "equal_width", 5)).tolist() == [
        *(0, 0, 0, 1, 4, 4, 4)
    ]
    counts = np.bincount(to_classes(np.arange(1000.0), bin_edges(np.arange(1000.0), "quantile", 20)))
    assert len(counts) == 20 and counts.min() == counts.max() == 50
    assert len(bin_edges(np.r_[np.zeros(90), np.arange(1, 11)], "quantile", 20)) < 21  # ties are merged
    edges = bin_edges(np.array([430.0, 440, 500]), "semitone", 20)
    assert len(edges) == 4  # A4, A#4, B4: 500 Hz is nearest to B4 = 493.9 Hz
    assert to_classes(np.array([440.0, 466.16, 493.88]), edges).tolist() == [0, 1, 2]
    with pytest.raises(EqknobsError, match="constant"):
        bin_edges(np.ones(9), "quantile", 20)


def test_a_corpus_without_pitch_says_what_to_do(world):
    with pytest.raises(EqknobsError, match=r"pitch.*remove pitch from probes\.properties"):
        world.fit("pitch", "unvoiced", voiced=np.zeros(COUNT), pitch=np.full(COUNT, np.nan))
    assert not list(world.folder.glob("unvoiced.*csv")) and not list(world.folder.glob("unvoiced.npz"))


def test_labels_of_another_cache_are_refused(world, tmp_path):
    labels = write_labels(tmp_path / "short.h5", world.logmel[:-1], centroid=world.labels["centroid"][:-1])
    with pytest.raises(EqknobsError, match="make the labels again"):
        fit_probes(
            Sources(world.cache, labels), Outputs(*(tmp_path / n for n in "abc")), CFG | {"property": "centroid"}
        )


def test_spaces(world):
    with ActivationCache(world.cache) as cache:
        found = make_spaces(cache, world.saes, 0)
        swapped = make_spaces(cache, dict(reversed(world.saes.items())), 0)
        acts = np.array(cache.acts[:500])
        raw = found["raw"].features(acts)
        assert raw == pytest.approx((acts - cache.mean) / cache.std, abs=1e-4)
        assert found["pca_l0"].width == 3 == swapped["pca_l0"].width  # the sparsest SAE decides, not the first named
        principal = found["pca_d"].features(acts)
        assert principal.shape == raw.shape and (principal**2).sum() == pytest.approx((raw**2).sum(), rel=1e-4)
        variance = found["pca_d"].features(np.array(cache.acts)).var(0)
        assert (np.diff(variance) <= 0.05).all()
        random = found["random_topk"].features(acts)
        assert random.shape == (500, 48) and ((random > 0).sum(1) <= 3).all() and (random > 0).any()
        assert np.array_equal(random, swapped["random_topk"].features(acts))
        assert np.array_equal(found["sae:sparse"].features(acts), SAE.load(world.saes["sparse"]).encode(acts))
        assert "logmel" not in found
        for space in found.values():
            assert space.features(acts).dtype == np.float32 and space.features(acts).shape == (500, space.width)
        assert list(make_spaces(cache, {}, 0)) == ["raw", "pca_d"]  # the others take their size from an SAE


@pytest.mark.parametrize("split", ["train", "val"])
def test_features_that_are_not_finite_end_in_a_line(world, centroid, split):
    with ActivationCache(world.cache) as cache:
        raw = make_spaces(cache, {}, 0)["raw"]
        source = np.array(cache.acts)
        source[cache.rows(split)[-1]] = np.nan
        with pytest.raises(EqknobsError, match=r"space raw has values that are not finite; train the SAE"):
            replace(raw, source=source).matrix()


def test_features_too_large_for_a_ridge_end_in_a_line(world, centroid):
    cfg = CFG | {"property": "centroid", "epochs": 1}
    with ActivationCache(world.cache) as cache:
        raw = make_spaces(cache, {}, 0)["raw"]
        large = replace(raw, features=lambda acts: raw.features(acts) * np.float32(1e25))
        question = probes.ask(cache, Sources(world.cache, centroid.labels), cfg)
        with pytest.raises(EqknobsError, match=r"space raw are too large for a ridge"), np.errstate(all="ignore"):
            probes.fit_space(large, question, cfg, "cpu")


def test_top_k():
    h = np.array([[3.0, 1, 2, 0], [0, 0, 5, 4]])
    assert top_k(h, 2).tolist() == [[3, 0, 2, 0], [0, 0, 5, 4]]
    assert top_k(h, 9) is h


def test_sparse_half_and_dense_storage_agree(world, monkeypatch):
    """Wide spaces are kept as CSR or in half precision; the fitted probe must not depend on it."""
    fits = {}
    with ActivationCache(world.cache) as cache, h5py.File(world.folder / "s.h5", "w"):
        labels = write_labels(world.folder / "storage.h5", world.logmel, **world.labels)
        frames = probes.labelled_frames(cache, labels, "pitch", [0])
        space = make_spaces(cache, world.saes, 0)["sae:sparse"]
        truth = to_classes(frames.values, bin_edges(frames.values[frames.of("train")], "quantile", 5))
        for kind, below, limit in (("dense", 0.0, 1 << 29), ("half", 0.0, 0), ("csr", 0.1, 0)):
            monkeypatch.setattr(spaces_module, "SPARSE_BELOW", below)
            monkeypatch.setattr(spaces_module, "FLOAT32_BYTES", limit)
            matrix = space.matrix()
            assert scipy.sparse.issparse(matrix) == (kind == "csr")
            assert matrix.dtype == (np.float16 if kind == "half" else np.float32)
            tasks = probes.Tasks(frames, np.column_stack([truth, truth]), [5, 5])
            cfg = {"l2": [0.01], "epochs": 4, "seed": 0}
            fits[kind] = (
                probes.fit_softmax(matrix, frames.rows, tasks, cfg, "cpu")[0].W,
                probes._fit_ridge(matrix, frames, [0], [0.01]).w,
            )
    for kind, tolerance in (("csr", 1e-3), ("half", 1e-2)):
        for got, wanted in zip(fits[kind], fits["dense"]):
            assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


# --- parts and pieces ---


def test_the_parts_are_what_all_at_once_is(world, centroid):
    base = world.fit_labelled("centroid", "base", centroid.labels, parts=["base"])
    saes = [
        world.fit_labelled("centroid", name, centroid.labels, parts=["sae"], saes={name: folder})
        for name, folder in world.saes.items()
    ]
    parts = {}
    for part in (base, *saes):
        parts |= part.arrays
    assert parts.keys() == centroid.arrays.keys()
    assert all(np.array_equal(parts[key], values) for key, values in centroid.arrays.items())
    for kind in ("scores", "ridge"):
        whole = getattr(centroid, kind)
        rows = pd.concat([getattr(part, kind) for part in (base, *saes)])
        order = ["space", *(["binning", "labels", "class"] if kind == "scores" else []), "id"]
        pd.testing.assert_frame_equal(*(t.sort_values(order, ignore_index=True) for t in (rows, whole)))
    files = [base.npz, *(part.npz for part in saes)]
    for space in ("raw", "sae:dense", "sae:sparse"):
        for found, wanted in zip(load_probe(files, space, "quantile"), load_probe(centroid.npz, space, "quantile")):
            assert np.array_equal(found, wanted)
    with pytest.raises(EqknobsError, match="no sae:dense:quantile:W"):
        load_probe(base.npz, "sae:dense", "quantile")


def test_a_fitted_space_is_kept_by_what_made_it(world, centroid, monkeypatch):
    fitted, fit_space = [], probes.fit_space

    def counting(space, *args):
        fitted.append(space.name)
        return fit_space(space, *args)

    monkeypatch.setattr(probes, "fit_space", counting)
    pieces = Pieces(world.folder / "pieces")

    def fit(saes=("sparse",), labels=centroid.labels, parts=("base", "sae"), **cfg):
        fitted.clear()
        dirs = {f"{name}-renamed" * renamed or name: world.saes[name] for name in saes}
        return world.fit_labelled(
            "centroid", "kept", labels, 2, cfg, saes=dirs, parts=parts, pieces=pieces
        ), fitted.copy()

    renamed = False
    first, names = fit()
    assert names == ["raw", "pca_l0", "pca_d", "random_topk", "sae:sparse", "logmel"]
    again, names = fit()
    assert names == [] and [p.read_bytes() for p in again.paths] == [p.read_bytes() for p in first.paths]
    assert fit(("dense",), parts=["sae"])[1] == ["sae:dense"]
    assert fit(("dense",))[1] == ["random_topk"]  # of another L0; no lower than d, at which pca_l0 is pca_d
    renamed = True
    other, names = fit()
    assert names == [] and other.accuracy("sae:sparse-renamed") == first.accuracy("sae:sparse")
    renamed = False
    for change in ({"l2": [0.1]}, {"lags": [0]}, {"bins": 9}, {"content": {"code": "other"}}):
        assert len(fit(**change)[1]) == 6, change
    logmel = write_labels(world.folder / "logmel.h5", world.logmel + 1, **world.labels)
    assert fit(labels=logmel)[1] == ["logmel"]
    moved = write_labels(world.folder / "moved.h5", world.logmel, **(world.labels | {"centroid": world.labels["rms"]}))
    assert len(fit(labels=moved)[1]) == 6


def test_lags_stay_inside_what_a_budget_of_frames_keeps_of_a_clip(world, centroid, tmp_path):
    clips = np.full(len(UTTERANCES), FRAMES)
    first, frames = kept_frames(clips, [f"{7919 * i:015x}" * 4 for i in range(len(clips))], COUNT // 3, 0)
    assert (frames < FRAMES).all() and len(set(first)) > 10
    whole = np.concatenate([i * FRAMES + np.arange(f, f + n) for i, (f, n) in enumerate(zip(first, frames))])
    utterances = [(*utterance[:3], int(n)) for utterance, n in zip(UTTERANCES, frames)]
    cache = write_cache(tmp_path / "cache.h5", world.acts[whole], utterances, first=first, clip_frames=clips)
    labels = write_labels(tmp_path / "l.h5", world.logmel[whole], **{k: v[whole] for k, v in world.labels.items()})
    with ActivationCache(cache) as opened, ActivationCache(world.cache) as full:
        found = probes.labelled_frames(opened, labels, "centroid", [-2, 3])
        assert len(found.rows) == sum(world.labels["energetic"][whole][edge(frames, 3, 2)])
        same = probes.labelled_frames(full, centroid.labels, "centroid", [0])
        assert np.array_equal(found.values, same.values[np.searchsorted(same.rows, whole[found.rows])])
        for lag in (-2, 3):
            assert np.array_equal(opened.acts[found.rows - lag], full.acts[whole[found.rows] - lag])
    paths = [tmp_path / name for name in ("p.npz", "s.csv", "r.csv")]
    cfg = CFG | {"property": "centroid", "epochs": 1, "parts": ["base"]}
    fit_probes(Sources(cache, labels), Outputs(*paths), cfg)
    assert Fitted(labels, *paths).arrays["lag:raw"] == LAG


def edge(frames: np.ndarray, left: int, right: int) -> np.ndarray:
    """Mask of the rows that lie so far inside their run."""
    place = np.concatenate([np.arange(n) for n in frames])
    return (place >= left) & (np.repeat(frames, frames) - 1 - place >= right)


# --- categories ---


@pytest.fixture(scope="module")
def sexed(tmp_path_factory) -> World:
    """A world whose first latent tells the speakers of odd number from the others."""
    world = World(tmp_path_factory.mktemp("sexed"))
    speakers = np.repeat([int(speaker) for _, speaker, _, _ in UTTERANCES], FRAMES)
    world.acts[:, 0] = np.where(speakers % 2, 2, -2) + np.random.default_rng(1).standard_normal(COUNT)
    world.cache = write_cache(world.folder / "sexed.h5", world.acts, UTTERANCES)
    world.plain = write_labels(world.folder / "plain.h5", world.logmel, **world.labels)
    return world


def test_a_probe_of_a_category_of_clips(sexed):
    manifest = sexed.manifest(sex=["F", "M"] * 8)
    found = sexed.fit_labelled("sex", "sex", sexed.plain, 4, manifest=manifest)
    assert found.arrays["categories"].tolist() == ["F", "M"] and set(found.scores["binning"]) == {"category"}
    assert found.accuracy("raw", "category") > 0.9
    assert abs(found.accuracy("raw", "category", "shuffled") - 0.5) < 0.1
    assert found.accuracy("majority", "category", "majority") == pytest.approx(0.5, abs=0.05)
    assert found.ridge.empty and list(found.ridge) == probes.RIDGE_COLUMNS
    assert found.arrays["lag:raw"] == 0 and found.arrays["raw:category:W"].shape == (2, D)
    assert found.scores["within_one"].isna().all()  # no category is the neighbour of another
    # Every energetic frame counts, those at the ends of a clip too.
    assert found.rows("raw", "category")["frames"].sum() == sexed.labels["energetic"][44 * FRAMES :].sum()
    truth = found.rows("raw", "category").assign(odd=lambda rows: rows["speaker"].astype(int) % 2)
    assert (truth["class"] == truth["odd"]).all()


def test_a_category_that_cannot_be_judged_is_named(sexed, capsys):
    values = ["UK", "US"] * 8
    values[2], values[13], values[1] = "NZ", "IE", ""
    manifest = sexed.manifest(accent=values, sex=["F"] * 16, domain=["read"] * 8 + ["told"] * 8)
    found = sexed.fit_labelled("accent", "accent", sexed.plain, 1, manifest=manifest)
    assert found.arrays["categories"].tolist() == ["UK", "US"]
    assert "accent: left out IE (0 speakers in train), NZ (1 speaker in train)" in capsys.readouterr().out
    assert set(found.scores["speaker"]) == {"08", "09", "10", "11", "12", "14"}
    for name, said in (
        ("sex", "sex: no other value; only 'F' remains"),
        ("domain", r"domain: left out read \(none in test\), told \(0 speakers in train\); nothing remains"),
        ("source", "no column source"),
        ("voice", r"voice: left out 00 \(none in test\)"),
    ):
        with pytest.raises(EqknobsError, match=f"{said}.*remove {name} from probes.properties"):
            sexed.fit_labelled(name, "none", sexed.plain, 1, manifest=manifest)


def test_a_probe_of_a_category_of_frames(sexed):
    """Integer codes with names in the labels file, as phones are to be."""
    codes = np.where(sexed.acts[:, 1] > sexed.acts[:, 1].mean(), 2, 0)
    codes[::5] = -1  # no phone there
    with pytest.raises(EqknobsError, match="no labels of phone"):
        sexed.fit_labelled("phone", "phone", sexed.plain, 1)
    labels = write_labels(sexed.folder / "phones.h5", sexed.logmel, **sexed.labels)
    with h5py.File(labels, "a") as file:
        file["phone"] = codes
        file["phone"].attrs["names"] = ["aa", "b", "sil"]
    found = sexed.fit_labelled("phone", "phone", labels, 4)
    assert found.arrays["categories"].tolist() == ["aa", "sil"]  # b occurs nowhere
    assert found.accuracy("raw", "category") > 0.9
    counted = sexed.labels["energetic"] & (codes >= 0)
    assert found.rows("raw", "category")["frames"].sum() == counted[44 * FRAMES :].sum()
