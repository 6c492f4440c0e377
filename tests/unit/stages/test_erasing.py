"""Labels told from few features, erased, and carried to another clip: every step where the answer is known."""

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import read_csv, read_json, write_csv
from eqknobs.pieces import Pieces
from eqknobs.sae import make_config, new_sae
from eqknobs.stages.erasing import checks, compute, probes
from eqknobs.stages.erasing.compute import Read, Written, removed_counts, score_erasing
from eqknobs.stages.erasing.samples import (
    all_clips,
    clip_task,
    nested,
    pooled,
    second_moment,
    sentence_parts,
    vowel_segments,
    vowel_tasks,
)
from eqknobs.stages.erasing.spaces import principal_axes, spaces_of
from eqknobs.stages.erasing.swaps import pairs_of
from eqknobs.stages.erasing.tables import Told, findings, gone_at, tabulate
from helpers import ROOT
from helpers.synthetic import write_cache

D, M, FRAMES = 16, 16, 6
SEX, PLACE = 3, 5  # the features that carry them
CFG = {
    "tasks": ["accent", "sex"],
    "selection": "inference",
    "vowels": 3,
    "segments": 500,
    "kept": [1, 4],
    "removed": [0.1, 0.5],
    "random": {"seeds": 3, "kept": [1], "removed": [0.1]},
    "shuffles": 2,
    "c": 1,
    "unpenalised": True,
    "swaps": [1, 4],
    "sources": 3,
    "seed": 0,
}


# --- orders, LEACE, probes ---


def test_fishers_score_is_what_it_says() -> None:
    x = np.array([[0.0, 1, 7, 0], [2, 1, 7, 0], [10, 1, 7, 1], [12, 1, 7, 1]])
    codes = np.array([0, 0, 1, 1])
    # Between: 4 · 5² = 100; within: 4 · 1² = 4.
    np.testing.assert_array_equal(probes.fisher(x, codes), [25, 0, 0, np.inf])
    assert probes.descending(probes.fisher(x, codes)).tolist() == [3, 0, 1, 2]


def test_leace_of_two_classes_is_known_in_closed_form() -> None:
    """A = δ δᵀ Σ⁻¹ / (δᵀ Σ⁻¹ δ): what is left has no covariance with the label, and is changed along δ alone."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, 400)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 2 * codes[:, None] * rng.normal(size=6)
    taken = probes.leace(x.T @ x / 400, x, codes)
    delta, sigma = x[codes == 1].mean(0) - x[codes == 0].mean(0), np.cov(x.T, bias=True)
    wanted = np.outer(delta, np.linalg.solve(sigma, delta)) / (delta @ np.linalg.solve(sigma, delta))
    np.testing.assert_allclose(taken, wanted, atol=1e-10)
    left = x - (x - x.mean(0)) @ taken.T
    np.testing.assert_allclose(left[codes == 1].mean(0), left[codes == 0].mean(0), atol=1e-10)
    assert probes.rank(taken) == 1
    assert len(set(probes.fit(left, codes, 1).say(left))) == 1  # the most frequent label


def test_leace_takes_out_a_dimension_fewer_than_there_are_classes() -> None:
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(4), 50)
    x = rng.normal(size=(200, 10)) + rng.normal(size=(4, 10))[codes]
    taken = probes.leace(x.T @ x / 200, x, codes)
    assert probes.rank(taken) == 3
    np.testing.assert_allclose(taken @ taken, taken, atol=1e-10)
    left = x - (x - x.mean(0)) @ taken.T
    assert np.ptp([left[codes == c].mean(0) for c in range(4)], axis=0).max() < 1e-10


@pytest.mark.parametrize("width", [5, 90])
def test_a_probe_with_more_columns_than_samples_is_the_same_regression(width: int) -> None:
    rng = np.random.default_rng(2)
    codes = np.repeat([0, 1, 2], 15)
    x = rng.normal(size=(45, width)) * rng.uniform(0.1, 9, width) + rng.normal(size=(3, width))[codes]
    x[:, 0] = 4  # never changes
    found = probes.fit(x, codes, 1)
    z = (x[:, 1:] - x[:, 1:].mean(0)) / x[:, 1:].std(0)
    plain = LogisticRegression(max_iter=5000, tol=1e-8).fit(z, codes)
    assert found.weights[0] == 0 and found.converged
    np.testing.assert_allclose(found.weights[1:], np.abs(plain.coef_).max(0), atol=2e-3)
    fresh = rng.normal(size=(30, width))
    told = plain.predict((fresh[:, 1:] - x[:, 1:].mean(0)) / x[:, 1:].std(0))
    assert (found.say(fresh) == told).mean() > 0.95


def test_a_probe_of_nothing_says_the_most_frequent() -> None:
    x, codes = np.ones((5, 3)), np.array([0, 1, 1, 0, 1])
    assert probes.fit(x, codes, 1).say(x[:2]).tolist() == [1, 1]
    assert probes.fit(x[:, :0], codes, None).say(x[:, :0]).tolist() == [1] * 5


def test_labels_of_speakers_are_shuffled_by_speakers() -> None:
    speakers, rng = np.repeat(list("abcdef"), 4), np.random.default_rng(0)
    codes = np.repeat([0, 0, 0, 1, 1, 1], 4)
    moved = probes.permuted(codes, speakers, True, rng)
    assert pd.Series(moved).groupby(speakers).nunique().max() == 1 and moved.sum() == 12
    assert pd.Series(probes.permuted(codes, speakers, False, rng)).groupby(speakers).nunique().max() == 2


# --- samples and tasks ---


def test_no_sentence_is_in_two_parts_and_every_voice_in_all() -> None:
    voices = [f"v{i}" for i in range(6) for _ in range(16)]
    sentences = [f"s{j}" for _ in range(6) for j in range(16)]
    parts = pd.DataFrame({"part": sentence_parts(sentences, voices, 0), "s": sentences, "v": voices})
    assert parts.groupby("s")["part"].nunique().max() == 1
    counts = pd.crosstab(parts["v"], parts["part"])
    assert (counts["train"] == 8).all() and (counts["test"] == 4).all() and (counts["val"] == 4).all()
    three = sentence_parts(["a", "b", "c"], ["v"] * 3, 0).tolist()
    assert sorted(three) == ["test", "train", "train"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """Clips of 24 speakers whose sex adds one feature's direction to every frame, the accent another's; folder."""
    folder, rng = tmp_path_factory.mktemp("erasing"), np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(M, D)))[0] * 3
    rows, utterances, acts = [], [], []
    for speaker in range(24):
        split = ("train", "val", "test")[(speaker >= 12) + (speaker >= 18)]
        sex, accent = speaker % 2, speaker // 2 % 2
        for clip in range(4):
            id = f"{speaker:02}-{clip}"
            frames = rng.normal(size=(FRAMES, D)) * 0.3
            frames += sex * directions[SEX] + accent * directions[PLACE]
            acts.append(frames)
            utterances.append((id, f"s{speaker:02}", split, FRAMES))
            rows.append((id, f"s{speaker:02}", "FM"[sex], ["UK", "US"][accent], split, f"Sentence {clip}."))
    write_cache(folder / "cache.h5", np.concatenate(acts), utterances)
    columns = ["id", "speaker", "sex", "accent", "split", "text"]
    write_csv(folder / "manifest.csv", pd.DataFrame(rows, columns=columns))
    config = make_config({"variant": "topk", "d_in": D, "d_sae": M, "k": 4, "aux_k": 0, "dead_epochs": 1})
    sae = new_sae(config, np.zeros(D), np.ones(D))
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    import torch

    state = sae.state_dict() | {"W_enc": torch.tensor(unit), "W_dec": torch.tensor(unit)}
    sae.load_state_dict({name: value.float() for name, value in state.items()})
    sae.save(folder / "sae")
    phones = np.tile(np.repeat([0, 1, 2, 3, 4, 5], 1), len(utterances))
    with h5py.File(folder / "labels.h5", "w") as file:
        file["phone"] = phones
        file["phone"].attrs["names"] = ["AA1", "k", "iy", "iy", "UW0", "oy"]
    return folder


def read_of(folder, labels=False) -> Read:
    return Read(
        folder / "manifest.csv", folder / "cache.h5", folder / "labels.h5" if labels else None, {"x": folder / "sae"}
    )


def written_to(folder) -> Written:
    run = folder / "run"
    return Written(
        run / "scores/t.l.erasing.csv",
        run / "scores/t.l.erasing_clips.csv",
        run / "scores/t.l.erasing_swaps.csv",
        run / "erasing/t.l.json",
    )


@pytest.fixture(scope="module")
def scored(world):
    written = written_to(world)
    score_erasing(read_of(world), written, CFG)
    rows = read_csv(written.probes)
    clips = read_csv(written.clips)
    true = {task: own["true"].to_numpy() for task, own in clips.groupby("task")}
    rows["score"] = [(np.array(str(row.said).split(), int) == true[row.property]).mean() for row in rows.itertuples()]
    return world, rows.assign(order=rows["order"].fillna("")), read_csv(written.swaps), read_json(written.found)


def score(rows: pd.DataFrame, **wanted) -> float:
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    assert len(rows)
    return rows["score"].mean()


def test_a_label_is_told_from_the_one_feature_that_carries_it(scored) -> None:
    _, rows, _, found = scored
    assert found["saes"]["x"]["sex"]["first"][0] == SEX and found["saes"]["x"]["accent"]["first"][0] == PLACE
    own = {"task": "sex", "property": "sex", "edit": "kept", "count": 1, "labels": "true"}
    for space in ("features", "reconstruction"):
        assert score(rows, space=space, order="fisher", **own) == 1
    assert score(rows, space="features", order="random", **own) < 0.8
    assert score(rows, task="sex", space="majority") == 0.5
    null = {**own, "labels": "shuffled"}
    assert score(rows, space="features", order="fisher", **null) < 0.8


def test_a_removed_feature_takes_its_label_along_and_leaves_the_other(scored) -> None:
    _, rows, _, found = scored
    gone = {"task": "sex", "edit": "removed", "space": "reconstruction", "order": "fisher", "count": 2}
    assert score(rows, property="sex", **gone) < 0.75 and score(rows, property="accent", **gone) == 1
    # One of three random orders begins with it.
    assert score(rows, task="sex", property="sex", edit="removed", space="features", order="random") > 0.75
    leace = {"task": "sex", "space": "raw", "order": "leace"}
    assert score(rows, property="sex", **leace) == 0.5 and score(rows, property="accent", **leace) == 1
    assert set(rows.loc[rows["order"] == "leace", "count"]) == {1}
    assert found["saes"]["x"]["sex"]["others"] == ["accent"]


def test_a_label_goes_to_another_clip_with_its_feature(scored) -> None:
    _, _, swaps, _ = scored
    total = swaps.assign(order=swaps["order"].fillna("")).groupby(["task", "space", "order"])[
        ["pairs", "caused", "asked", "kept", "count"]
    ]
    found = total.sum()
    cause, isolation = found["caused"] / found["pairs"], found["kept"] / found["asked"]
    for task in ("sex", "accent"):
        assert cause[task, "features", "fisher"] > 0.9 and isolation[task, "features", "fisher"] == 1
        assert cause[task, "raw", "leace"] == 1 and isolation[task, "raw", "leace"] == 1
        assert cause[task, "nothing", ""] == 0 and isolation[task, "nothing", ""] == 1
        assert cause[task, "whole", ""] == 1 and isolation[task, "whole", ""] < 0.9
        assert cause[task, "features", "random"] < 0.7


def test_what_was_told_is_not_fitted_again(world, tmp_path, monkeypatch) -> None:
    pieces = Pieces(tmp_path)
    score_erasing(read_of(world), written_to(tmp_path / "a"), CFG, pieces)
    asked = []
    fit = probes.fit
    monkeypatch.setattr(probes, "fit", lambda *args: asked.append(1) or fit(*args))
    more = CFG | {"kept": [1, 4, 8]}
    score_erasing(read_of(world), written_to(tmp_path / "b"), more, pieces)
    fitted = len(asked)
    asked.clear()
    score_erasing(read_of(world), written_to(tmp_path / "c"), more, Pieces(None))
    assert fitted < len(asked) / 2
    assert (tmp_path / "b/run/scores/t.l.erasing.csv").read_bytes() == (
        tmp_path / "c/run/scores/t.l.erasing.csv"
    ).read_bytes()


def test_who_speaks_is_told_of_other_sentences_and_decides_the_sex(world) -> None:
    manifest = read_csv(world / "manifest.csv").set_index("id")
    with ActivationCache(world / "cache.h5") as cache:
        from eqknobs.sae import SAE

        clips = pooled(cache, SAE.load(world / "sae"), all_clips(cache), 0)
    voice, sex, accent = (clip_task(name, clips, manifest, 0) for name in ("voice", "sex", "accent"))
    assert len(voice.names) == 12  # of val and test: no SAE learnt from them
    texts = {part: set(manifest.loc[clips.about.loc[rows, "id"], "text"]) for part, rows in voice.rows.items()}
    assert not texts["train"] & texts["test"] and len(texts["train"]) == 2
    assert nested(voice, sex) and nested(voice, accent) and not nested(sex, accent)
    assert sex.by_speaker and not voice.by_speaker
    crossed = manifest.assign(accent=np.where(np.arange(len(manifest)) % 2, "a", "b"))
    crossed = clip_task("accent", clips, crossed, 0)
    assert not crossed.by_speaker and not nested(crossed, sex) and not nested(crossed, voice)
    with pytest.raises(EqknobsError, match="no column domain"):
        clip_task("domain", clips, manifest, 0)
    with pytest.raises(EqknobsError, match=r"0 value\(s\) of sex"):
        clip_task("sex", clips, manifest.assign(sex=""), 0)


def test_vowels_are_runs_of_frames(world) -> None:
    with ActivationCache(world / "cache.h5") as cache:
        about, codes, names = vowel_segments(cache, world / "labels.h5", 3, 500, 0)
        assert names == ["aa", "iy", "oy"]  # iy twice as long, the others alike: in order
        assert set(about.loc[codes == 1, "frames"]) == {2} and (about["frames"].to_numpy()[codes != 1] == 1).all()
        assert len(about) == 3 * 96 and (about["start"] % FRAMES)[codes == 1].eq(2).all()
        fewer, _, _ = vowel_segments(cache, world / "labels.h5", 3, 20, 0)
        assert fewer["split"].value_counts().to_dict() == {"train": 20, "val": 20, "test": 20}
        from eqknobs.sae import SAE

        sae = SAE.load(world / "sae")
        samples = pooled(cache, sae, about, 0)
        row = about.iloc[40]
        acts = np.array(cache.acts[row.start : row.start + row.frames])
        np.testing.assert_allclose(samples.most[40], sae.encode(acts).max(0), atol=1e-6)
        np.testing.assert_allclose(samples.raw[40], acts.mean(0, dtype=np.float64))
        moment = second_moment(cache, about.iloc[40:41])
        np.testing.assert_allclose(moment, acts.T.astype(float) @ acts / len(acts), atol=1e-5)
        tasks = vowel_tasks(samples, codes, names)
        assert [task.name for task in tasks] == ["vowel aa", "vowel iy", "vowel oy"]
        np.testing.assert_array_equal(tasks[1].codes["test"], codes[tasks[1].rows["test"]] == 1)
        assert not nested(tasks[0], tasks[1])
    with h5py.File(world / "none.h5", "w") as file:
        file["rms"] = [0.0]
    with ActivationCache(world / "cache.h5") as cache, pytest.raises(EqknobsError, match="no phones"):
        vowel_segments(cache, world / "none.h5", 3, 500, 0)


def test_vowels_are_judged_beside_each_other_and_not_swapped(world, tmp_path) -> None:
    written = written_to(tmp_path)
    score_erasing(read_of(world, True), written, CFG | {"tasks": ["vowels"]})
    rows, found = read_csv(written.probes), read_json(written.found)["saes"]["x"]
    assert found["vowel aa"]["others"] == ["vowel iy", "vowel oy"] and read_csv(written.swaps).empty
    erased = rows[(rows["order"] == "leace") & (rows["task"] == "vowel iy") & (rows["property"] == "vowel iy")]
    assert set(erased["said"].iloc[0].split()) == {"0"}


def test_reconstructions_are_what_the_sae_decodes(world) -> None:
    from eqknobs.sae import SAE

    sae = SAE.load(world / "sae")
    with ActivationCache(world / "cache.h5") as cache:
        clips = pooled(cache, sae, all_clips(cache), 0)
        spaces = spaces_of(clips, sae, np.arange(M), principal_axes(cache))
        acts = np.array(cache.acts[:FRAMES])
    space, rows = spaces["reconstruction"], np.array([0])
    np.testing.assert_allclose(space.matrix(rows, np.arange(M))[0], sae(acts).mean(0), atol=1e-5)
    code = sae.encode(acts)
    code[:, [0, SEX]] = 0
    left = np.setdiff1d(np.arange(M), [0, SEX])
    np.testing.assert_allclose(space.matrix(rows, left)[0], sae.decode(code).mean(0), atol=1e-5)
    axes = principal_axes(ActivationCache(world / "cache.h5"))
    np.testing.assert_allclose(axes.T @ axes, np.eye(D), atol=1e-10)


def test_a_clip_gets_what_another_label_has(world) -> None:
    manifest = read_csv(world / "manifest.csv").set_index("id")
    from eqknobs.sae import SAE

    with ActivationCache(world / "cache.h5") as cache:
        clips = pooled(cache, SAE.load(world / "sae"), all_clips(cache), 0)
    task = clip_task("sex", clips, manifest, 0)
    base, source = pairs_of(task, "test", 3, 0)
    label = task.labels()
    assert len(base) == 3 * 24 and (label[base].to_numpy() != label[source].to_numpy()).all()
    assert set(base) == set(task.rows["test"])


def test_shares_become_counts() -> None:
    assert removed_counts([0.001, 0.5, 0.999], 10) == [1, 5, 9]
    assert removed_counts([0.5], 1) == []


# --- what is made of it ---


def test_scores_are_accuracies_and_correlations_drawn_over_clips() -> None:
    rng = np.random.default_rng(0)
    clips = pd.DataFrame({"id": [f"c{i // 2:02}" for i in range(60)], "speaker": [f"s{i // 12}" for i in range(60)]})
    clips["true"] = rng.integers(0, 2, 60)
    said = np.where(rng.random(60) < 0.8, clips["true"], 1 - clips["true"])
    cfg = {"bootstrap": 50, "seed": 0}
    accuracy, mcc = Told(clips, False, cfg).scores(said), Told(clips, True, cfg).scores(said)
    assert accuracy.shape == mcc.shape == (51,)
    assert accuracy[0] == pytest.approx((said == clips["true"]).mean())
    assert mcc[0] == pytest.approx(matthews_corrcoef(clips["true"], said))
    assert Told(clips, True, cfg).scores(np.zeros(60, int))[0] == 0  # as of the most frequent
    by_clip = Told(clips, False, cfg).by_clip(said, np.array(clips["true"]))
    assert (
        len(by_clip) == 30
        and by_clip["asked"].eq(2).all()
        and by_clip["change"].sum() == -(said != clips["true"]).sum()
    )


def test_a_label_is_gone_where_it_stays_gone() -> None:
    shares = np.array([0, 0.1, 0.5])
    excess = np.array([[0.4, 0.4, 0.4, 0.0], [0.0, 0.0, 0.4, 0.0], [0.0, 0.4, 0.3, 0.0]])
    assert gone_at(shares, excess, 0.05).tolist() == [0.1, 1, 1, 0]


def test_tables_and_findings_of_a_known_world(scored) -> None:
    world, _, _, _ = scored
    cfg = {"bootstrap": 100, "seed": 0, "unmeasurable_wer": 0.5, "word_codebooks": None, "targets": ["t.l"]}
    own = {"targets": ["t.l"], "tolerance": 0.05}
    at = Context("t.l", Inputs.below(world / "run"), cfg | {"stages": {"erasing": own}}, own)
    found = tabulate(at)
    top, gone, ravel = (found.tables[name] for name in ("topk_probing", "unlearning", "ravel"))
    one = top[(top["task"] == "sex") & (top["space"] == "features") & (top["order"] == "fisher") & (top["k"] == 1)]
    assert one["score"].iloc[0] == 1 and one["majority"].iloc[0] == 0.5 and one["shuffled"].iloc[0] < 0.8
    assert (one["clips"].iloc[0], one["speakers"].iloc[0]) == (24, 6)
    leace = gone[(gone["task"] == "sex") & (gone["order"] == "leace")].iloc[0]
    assert leace["gone"] == pytest.approx(1 / D) and leace["off_change"] == 0 and leace["off_target"] == 1
    assert set(gone.loc[gone["order"] == "random", "gone"]) == {1}
    assert gone.loc[gone["order"] == "classifier", "off_target"].isna().all()
    swapped = ravel.set_index(["task", "space", "order"])
    assert swapped.loc[("sex", "nothing", ""), "both"] == 0.5
    assert swapped.loc[("sex", "raw", "leace"), "both"] == 1
    facts = found.facts | {
        "comparisons": [dict(record, p_holm=record["p"], compared=1) for record in found.comparisons]
    }
    lines = findings(at, facts)
    text = " ".join(line["text"] for line in lines)
    assert "1 feature of x tell" in text or "1 feature of x" in text
    assert "LEACE takes out 1 dimension of 16" in text
    families = {str(record["family"]).split(",")[0] for record in found.comparisons}
    assert {"few columns", "swaps"} <= families


# --- configuration ---


def config(tasks: dict, **corpora) -> dict:
    return {
        "run": {"targets": ["w.layer.0", "w.layer.1"]},
        "models": {"w": {"kind": "whisper"}},
        "saes": {"x": {}},
        "data": {},
        "corpora": corpora,
        "erasing": {"tasks": tasks, "targets": ["w.layer.1"]},
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (config({"speech": ["pitch"]}), "erasing.tasks.speech: 'pitch' is no task"),
        (config({"nowhere": ["sex"]}), "erasing.tasks: names the corpus 'nowhere'"),
        (config({"speech": ["vowels"]}), "vowels need phones; give data.phones"),
        (config({"mix": ["vowels"]}, mix={"of": ["talk"]}, talk={}), "give corpora.mix.phones"),
        (config({"speech": ["sex"]}) | {"erasing": {"tasks": {"speech": ["sex"]}, "saes": ["y"]}}, "erasing.saes"),
    ],
)
def test_tasks_that_cannot_be_are_refused(given: dict, said: str) -> None:
    with pytest.raises(EqknobsError) as caught:
        checks.check(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_targets_hear_the_corpora_that_have_tasks() -> None:
    given = config({"speech": ["sex"], "mix": ["domain"]}, mix={"of": ["talk"]}, talk={})
    checks.check(given)
    assert checks.erased_targets(given) == ["w.layer.1@mix", "w.layer.1"]
    assert checks.erased_targets(given | {"erasing": None}) == []


def test_full_counts_fit_no_more_than_2000_probes(world, tmp_path, monkeypatch) -> None:
    """Of config/audiosae-tiny.en.yaml, if every corpus had the most tasks that one of them has."""
    from eqknobs.config import read_config

    full = read_config(ROOT / "config/audiosae-tiny.en.yaml")["erasing"]
    cfg = {**CFG, **{name: value for name, value in full.items() if name in CFG}}
    monkeypatch.setattr(compute.probes, "fit", lambda x, codes, c: probes.Probe(0, x, x, x, None, x[0], True))
    fits = 0
    for tasks in full["tasks"].values():
        kinds = ["vowels"] if "vowels" in tasks else []
        clips = ["sex", "accent", "voice"][: len(set(tasks) - {"vowels"})]
        written = written_to(tmp_path / "-".join(tasks))
        score_erasing(read_of(world, bool(kinds)), written, {**cfg, "tasks": clips + kinds})
        fits += read_json(written.found)["fits"]
    assert 1000 < fits <= 2000
