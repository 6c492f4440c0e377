"""Accent in sparse codes: speech, codes, classifiers and their measures."""

import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

from eqknobs.corpus import synthesis
from eqknobs.errors import EqknobsError
from eqknobs.io import write_csv
from eqknobs.models import load_model
from eqknobs.pieces import Pieces
from eqknobs.stages.accent import checks, coding, tables
from eqknobs.stages.accent.classify import classify
from eqknobs.stages.accent.coding import Cell, grid_cells
from eqknobs.stages.accent.compute import halves, score_accent, task_of, thinned
from eqknobs.stages.accent.section import DENSE, TABLE_2, retained
from helpers import ROOT

ESPEAK = pytest.mark.skipif(find_spec("espeakng_loader") is None, reason="needs espeak-ng")
SAE = {"lr": 0.003, "tuned_lr": [0.003], "epochs": 20, "batch_size": 64, "aux_k": 16, "dead_epochs": 2}
MODEL = {"name": "tiny-mimi", "kind": "mimi", "path": str(ROOT / "resources/models/tiny-mimi"), "device": "cpu"}
SYNTHESIS = {
    "accents": ["en-us", "en-gb-scotland"],
    "variants": ["m1", "m2", "m3", "f1", "f2", "f3"],
    "sentences": str(ROOT / "resources/accents/sentences.txt"),
    "count": 5,
    "level_db": -26.0,
    "splits": {"train": 0.34, "val": 0.33, "test": 0.33},
}


# --- speech


@ESPEAK
def test_a_clip_depends_on_its_accent_variant_and_sentence_alone() -> None:
    first = synthesis.say("en-us", "m1", "we can't dance in the bath")
    synthesis.say("en-gb-scotland", "f3", "something else")
    again = synthesis.say("en-us", "m1", "we can't dance in the bath")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, synthesis.say("en-us", "m2", "we can't dance in the bath"))
    with pytest.raises(EqknobsError, match="no voice 'en-xx'"):
        synthesis.say("en-xx", "m1", "hello")
    with pytest.raises(EqknobsError, match="no variant 'nobody'"):
        synthesis.sex_of("nobody")
    assert (synthesis.sex_of("f1"), synthesis.sex_of("m1")) == ("F", "M")


@ESPEAK
def test_accent_is_crossed_with_speaker_and_test_is_unseen(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv", synthesis.synthesise(tmp_path / name, SYNTHESIS, 0))
    manifest = pd.read_csv(tmp_path / "a.csv")
    assert list(manifest["sha256"]) == list(pd.read_csv(tmp_path / "b.csv")["sha256"])
    said = manifest.groupby("accent").apply(lambda own: set(zip(own["speaker"], own["text"], own["split"])))
    assert said.iloc[0] == said.iloc[1]
    of = {split: own for split, own in manifest.groupby("split")}
    for other in ("train", "val"):
        assert not set(of["test"]["text"]) & set(of[other]["text"])
        assert not set(of["test"]["speaker"]) & set(of[other]["speaker"])
    assert not set(of["train"]["speaker"]) & set(of["val"]["speaker"])


def test_what_is_no_pause_gets_the_level_and_ends_go() -> None:
    wav = np.zeros(22050, np.float32)
    wav[4410:13230] = 0.01 * np.sin(np.arange(8820) / 5)
    made = synthesis.levelled(wav, -26)
    assert len(made) == 8820
    assert 20 * np.log10(np.sqrt(np.mean(made.astype(float) ** 2))) == pytest.approx(-26, abs=0.1)


def test_splits_spread_groups_and_refuse_what_is_too_few() -> None:
    names = {f"m{i}": "M" for i in range(6)} | {f"f{i}": "F" for i in range(6)}
    found = synthesis.allotted(names, {"train": 0.5, "val": 0.25, "test": 0.25}, 0)
    assert sorted(found.values()) == ["test"] * 3 + ["train"] * 6 + ["val"] * 3
    assert {names[name] for name, split in found.items() if split == "test"} == {"F", "M"}
    with pytest.raises(EqknobsError, match="too few"):
        synthesis.allotted({"a": "M", "b": "F"}, {"train": 0.5, "val": 0.25, "test": 0.25}, 0)


# --- codes


def test_k_is_of_d() -> None:
    assert {cell.k for cell in grid_cells(128, [2, 20], [0.05])} == {7}
    assert [cell.k for cell in grid_cells(512, [2], [0.5, 0.25, 0.1, 0.05])] == [26, 52, 128, 256]
    equal = coding.equal_cells(128, 2, [7, 500], [0.01])
    assert [(cell.k, cell.kind) for cell in equal] == [(7, "equal_k"), (3, "equal_share")]


def test_positions_and_magnitudes_halve_a_code() -> None:
    codes = csr_matrix(np.array([[0, 3.0, 0, 1.0], [0, 0, 2.0, 0]], np.float32))
    assert coding.positions(codes).toarray().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    kept, padded = coding.magnitudes(codes, 2)
    assert kept.tolist() == [[3, 1], [2, 0]] and padded == 0.25


def test_top_of_keeps_the_largest_by_size() -> None:
    assert coding.top_of(np.array([[1.0, -3.0, 2.0]]), 2).toarray().tolist() == [[0, -3, 2]]


def test_density_of_even_and_of_uneven_firing() -> None:
    even = coding.density(csr_matrix(np.ones((4, 8), np.float32)))
    assert (even["gini"], even["effective"], even["dead"]) == pytest.approx((0, 8, 0))
    one = coding.density(csr_matrix(np.eye(1, 8, dtype=np.float32).repeat(4, 0)))
    assert (one["gini"], one["effective"], one["dead"]) == pytest.approx((7 / 8, 1, 7 / 8))


def test_the_sae_is_the_papers() -> None:
    """No bias of the encoder, k active at most, a constant learning rate, and it learns."""
    rng = np.random.default_rng(0)
    u = (rng.normal(size=(256, 4)) @ rng.normal(size=(4, 16)) + 5).astype(np.float32)
    trainer = coding.new_trainer(u, Cell(2, 4), SAE, 0)
    before = coding.fvu(trainer.sae, u)
    found = coding.train(trainer, u, u[:50])
    sae = trainer.sae
    assert coding.fvu(sae, u) < min(before, 0.6)
    assert not sae.b_enc.any()
    assert (np.diff(coding.codes_of(sae, u).indptr) <= 4).all()
    z = torch.relu((torch.from_numpy(u) - sae.b_dec) @ sae.W_enc.T)
    kept = torch.zeros_like(z).scatter(1, z.topk(4).indices, z.topk(4).values)
    assert np.allclose(coding.codes_of(sae, u).toarray(), kept.detach().numpy(), atol=1e-4)
    assert trainer.optimiser.param_groups[0]["lr"] == SAE["lr"] == found["lr"]
    again = coding.new_trainer(u, Cell(2, 4), SAE, 0)
    assert coding.train(again, u, u[:50]) == found


# --- classifiers


def test_sparse_codes_give_what_centred_ones_do() -> None:
    """The intercept takes up the mean: the same optimum, but for how exactly saga finds it."""
    rng = np.random.default_rng(0)
    z = np.abs(rng.normal(size=(200, 40))) * (rng.random((200, 40)) < 0.2)
    y = (z[:, :3].sum(1) > 0.5).astype(int)
    told = classify(csr_matrix(z[:150]), y[:150], csr_matrix(z[150:]), 1.0, 3000, 0)
    scaler = StandardScaler().fit(z[:150])
    other = LogisticRegression(l1_ratio=1, solver="saga", max_iter=3000).fit(scaler.transform(z[:150]), y[:150])
    assert told.converged
    assert np.mean(told.said == other.predict(scaler.transform(z[150:]))) >= 0.96
    assert not classify(z[:150], y[:150], z[150:], 1.0, 1, 0).converged


def test_a_column_that_never_changes_is_left_out() -> None:
    y = np.array([0, 1] * 10)
    x = np.ones((20, 1))
    assert classify(x, y, x, 1.0, 100, 0).weights == 0


# --- measures


def test_macro_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    true, said = rng.integers(0, 2, 60), rng.integers(0, 2, (5, 60))
    weight = rng.integers(0, 3, (3, 60))
    counted = tables.confusion(said, true, weight)
    for draw in range(3):
        rows = np.repeat(np.arange(60), weight[draw])
        for run in range(5):
            expected = f1_score(true[rows], said[run, rows], average="macro")
            assert tables.macro_f1(counted)[draw, run] == pytest.approx(expected)
            expected = balanced_accuracy_score(true[rows], said[run, rows])
            assert tables.balanced(counted)[draw, run] == pytest.approx(expected)


def test_the_constant_answer_retains_nothing_and_the_reference_all() -> None:
    assert tables.retained(0.4, 0.8, 0.4) == 0 and tables.retained(0.8, 0.8, 0.4) == 1
    assert math.isnan(tables.retained(0.6, 0.41, 0.4))


def test_published_tables_reread() -> None:
    """Figures of notes that were computed by hand: EnCodec's collapsed position is the constant answer."""
    assert [round(retained(x, DENSE["DAC"]), 2) for x in TABLE_2["DAC", "full"]] == [0.86, 0.75, 0.91, 0.81]
    assert retained(TABLE_2["EnCodec 6 kbps", "position"][0], DENSE["EnCodec 6 kbps"]) == pytest.approx(0, abs=0.001)


# --- halves, tasks, the whole


def clips_of(count: int = 24) -> pd.DataFrame:
    split = ["train", "val", "test"] * (count // 3)
    accent = ["us", "uk"] * (count // 2)
    return pd.DataFrame({"id": [f"c{i:02}" for i in range(count)], "accent": accent, "split": split, "speaker": split})


def test_val_is_halved_label_by_label() -> None:
    clips = clips_of()
    parts = halves(clips, 0)
    assert not set(parts.watch) & set(parts.fit)
    assert sorted([*parts.watch, *parts.fit]) == list(np.flatnonzero(clips["split"] == "val"))
    assert clips["accent"].iloc[parts.fit].value_counts().to_dict() == {"us": 2, "uk": 2}
    task = task_of("t", {"zero": ["us"], "one": ["uk"]}, clips, parts)
    assert task.train.tolist() == [int(a == "uk") for a in clips["accent"].iloc[parts.fit]]
    with pytest.raises(EqknobsError, match="one side alone"):
        task_of("t", {"zero": ["us"], "one": ["fr"]}, clips, parts)


def test_dear_models_read_as_many_clips_of_each_split_and_accent() -> None:
    clips = clips_of(48)
    few = thinned(clips, 3, 0)
    assert (few.groupby(["split", "accent"]).size() == 3).all() and few["id"].is_monotonic_increasing
    assert list(few) == list(clips) and set(few["id"]) <= set(clips["id"])
    assert set(few["id"]) <= set(thinned(clips, 5, 0)["id"])  # more are the same and others
    assert list(thinned(clips, 99, 0)["id"]) == list(clips["id"])
    assert list(thinned(clips, 3, 1)["id"]) != list(few["id"])


def test_what_the_decoder_gets_and_weights_without_learning() -> None:
    model: Any = load_model(MODEL)
    wav = np.sin(np.arange(16000) / 20).astype(np.float32)
    acts = model.encode(wav, "encoder_transformer")
    given = model.decoder_input(acts, "encoder_transformer", 4)
    sound = model.sound(torch.from_numpy(given.T.copy())[None], len(wav))
    assert np.allclose(sound, model.decode(acts, "encoder_transformer", len(wav), 4), atol=1e-5)
    assert not np.allclose(given, model.decoder_input(acts, "encoder_transformer"))
    before = {name: tensor.clone() for name, tensor in model.net.named_parameters()}
    model.shuffle_weights(0)
    name = next(name for name, tensor in before.items() if tensor.ndim > 1)
    after = dict(model.net.named_parameters())[name]
    assert not torch.equal(before[name], after)
    assert torch.equal(before[name].flatten().sort().values, after.flatten().sort().values)
    assert np.isfinite(model.decoder_input(model.encode(wav, "encoder_transformer"), "encoder_transformer", 4)).all()


@ESPEAK
def test_every_row_of_a_run(tmp_path: Path) -> None:
    write_csv(tmp_path / "manifest.csv", synthesis.synthesise(tmp_path / "speech", SYNTHESIS, 0))
    cfg = {
        "model": MODEL,
        "codec": {"codebooks": [2, 4], "grid": 4, "shuffled": True},
        "tasks": {"us_uk": {"zero": ["en-us"], "one": ["en-gb-scotland"]}},
        "seconds": 1.0,
        "ratios": [1, 2],
        "sparsities": [0.02],
        "curve": {"ratios": [1], "sparsities": [0.02]},
        "equal_k": [3],
        "equal_share": [0.01],
        "reference": {"ratio": 1, "sparsity": 0.02},
        "seeds": 2,
        "frames": 50,
        "sae": SAE | {"epochs": 2},
        "classifier": {"c": 1.0, "tuned_c": [0.1, 1.0], "max_iter": 50},
        "seed": 0,
    }
    outputs = [tmp_path / name for name in ("runs.csv", "clips.csv", "found.json")]
    score_accent(tmp_path / "manifest.csv", *outputs, cfg, Pieces(tmp_path / "pieces"))
    first = [path.read_bytes() for path in outputs]
    score_accent(tmp_path / "manifest.csv", *outputs, cfg)  # without the store: the same
    assert [path.read_bytes() for path in outputs] == first
    runs, clips = pd.read_csv(outputs[0], dtype={"said": str}), pd.read_csv(outputs[1])
    assert {len(said) for said in runs["said"]} == {len(clips)}
    readings = {tuple(row) for row in runs[["weights", "site", "codebooks"]].to_numpy()}
    trained = {("trained", "decoder_input", 4), ("trained", "decoder_input", 2), ("trained", "unquantised", 0)}
    assert readings == trained | {("shuffled", "decoder_input", 4), ("shuffled", "unquantised", 0)}
    kinds = "constant dense duration frames full l1 loudness magnitude norm pca position random_topk shuffled"
    assert set(runs["features"]) == {*kinds.split(), "stratified", "top_k"}
    full = runs[runs["features"] == "full"]
    assert set(full["cell"]) == {"grid", "equal_k", "equal_share", "reference"}
    assert set(full["recipe"]) == {"paper", "tuned", "openai"} and set(full["seed"]) == {0, 1}
    assert full["fvu"].notna().all()


def test_checks_name_what_does_not_fit() -> None:
    def config(**accent: Any) -> dict[str, Any]:
        synthesis = {"accents": ["en-us", "en-029"], "splits": {"train": 0.5, "val": 0.25, "test": 0.25}}
        tasks = {"t": {"zero": ["en-us"], "one": ["en-029"]}}
        base = {"corpus": None, "synthesis": synthesis, "tasks": tasks, "codecs": {"m": {}}}
        return {"models": {"m": {"kind": "mimi"}, "w": {"kind": "whisper"}}, "accent": base | accent}

    checks.check(config())
    both = {"t": {"zero": ["en-us"], "one": ["en-us"]}}
    for accent, message in (
        ({"codecs": {"x": {}}}, "'x' is not under models"),
        ({"codecs": {"w": {"codebooks": [2]}}}, "no codec"),
        ({"codecs": {"m": {"codebooks": [2], "grid": 4}}}, "not among its codebooks"),
        ({"tasks": both}, "on both sides"),
        ({"tasks": {"t": {"zero": ["en-us"], "one": ["fr"]}}}, "'fr' is not among"),
        ({"corpus": "nowhere"}, "'nowhere' is not one of"),
    ):
        with pytest.raises(EqknobsError, match=message):
            checks.check(config(**accent))


def test_means_over_seeds_share_draws() -> None:
    """The gain over a random encoder is paired: the same draws of the same clips."""
    clips = pd.DataFrame({"id": list("abcdefgh"), "speaker": list("aabbccdd"), "task": "t", "split": "test"})
    clips["true"] = [0, 1] * 4
    about = {
        "weights": "trained",
        "site": "x",
        "codebooks": 4,
        "task": "t",
        "converged": True,
        "cell": "",
        "recipe": "",
    }
    cell = {"q": 2.0, "s": 0.05, "k": 3, "d_z": 8, "cell": "grid"}
    rows = [
        {**about, "features": "dense", "said": "01010101", "seed": 0},
        {**about, "features": "constant", "said": "00000000", "seed": 0},
        *({**about, **cell, "recipe": "paper", "features": "full", "said": "01010100", "seed": s} for s in (0, 1)),
        {**about, **cell, "recipe": "random", "features": "random_topk", "said": "01010100", "seed": 0},
    ]
    runs = pd.DataFrame(rows).assign(fvu=0.1, flat=1.0)
    files = {"scores/m.accent.csv": runs, "scores/m.accent_clips.csv": clips}
    inputs = SimpleNamespace(csv=lambda name: files[name].copy())
    at = SimpleNamespace(target="m", inputs=inputs, cfg={"bootstrap": 50, "seed": 0}, own={})
    made = tables.tabulate(at)  # type: ignore[arg-type]
    facts = {row["features"]: row for row in made.facts["accent"]}
    assert facts["full"]["seeds"] == 2
    assert (facts["full"]["gain"], facts["full"]["gain_low"], facts["full"]["gain_high"]) == (0, 0, 0)
    assert facts["dense"]["retained_share"] == 1 and facts["constant"]["retained_share"] == 0
    assert len(made.tables["accent"]) == 5
