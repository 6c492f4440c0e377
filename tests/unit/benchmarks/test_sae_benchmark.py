"""The benchmark's own part, without peers: it runs, and our variants still stand in the committed order."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import sae_training
from helpers import ROOT
from sae_training import Task, makers

COMMITTED = ROOT / "benchmarks/results/sae_training.csv"
VARIANTS = {"topk", "topk+auxk", "batchtopk", "batchtopk+auxk", "jumprelu", "rms_l1"}
APART = 1.5  # times that two variants must differ in the committed file for their order to count


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables after three timed and three training steps of our engine, at the committed width, features and k."""
    out = tmp_path_factory.mktemp("benchmark") / "sae_training.csv"
    shape = "--batch 2048 --fvu-batch 256 --frames 2048 --rounds 3 --steps 3 --threads 1".split()
    sae_training.main(["--libraries", "eqknobs", "--out", str(out), *shape])
    return pd.read_csv(out), pd.read_csv(out.with_name("sae_training_equal_time.csv"))


def test_columns_and_values(files):
    rows, equal_time = files
    wanted = "library version variant threads step_ms floor_ratio peak_memory_mb fvu l0 machine".split()
    assert list(rows.columns) == wanted == sae_training.COLUMNS
    assert list(equal_time.columns) == "library variant seconds steps fvu l0".split()
    assert set(rows["variant"]) == VARIANTS and set(rows["library"]) == {"eqknobs"} and set(rows["threads"]) == {1}
    assert (rows[["step_ms", "floor_ratio", "peak_memory_mb"]] > 0).all(axis=None)
    assert rows["machine"].nunique() == 1 and rows["machine"].str.fullmatch(r".+, \d+ cores").all()
    plain = rows[~rows["variant"].str.contains("+", regex=False)].set_index("variant")
    assert (plain["fvu"] > 0).all() and np.isfinite(plain["fvu"]).all() and (plain["l0"] > 0).all()
    assert (plain.loc[["topk", "batchtopk"], "l0"] == 32).all()
    assert rows[rows["variant"].str.contains("+", regex=False)]["fvu"].isna().all()
    assert set(equal_time["variant"]) == set(plain.index) and equal_time["steps"].between(1, 3).all()


@pytest.mark.skipif(not COMMITTED.exists(), reason="benchmarks/results/sae_training.csv is not made yet")
def test_the_order_of_our_variants_is_the_committed_one(files):
    committed = (
        pd.read_csv(COMMITTED).query("library == 'eqknobs' and threads == 1").set_index("variant")["floor_ratio"]
    )
    found = files[0].set_index("variant")["floor_ratio"]
    assert set(committed.index) == VARIANTS
    pairs = [(a, b) for a, b in itertools.permutations(committed.index, 2) if committed[a] > APART * committed[b]]
    assert pairs
    wrong = [f"{a} ({found[a]:.2f}) is not slower than {b} ({found[b]:.2f})" for a, b in pairs if found[a] <= found[b]]
    assert not wrong, "; ".join(wrong)


def test_half_of_the_features_sleep_where_auxk_is_timed():
    task, data = Task(32, 256, 128, 4), sae_training.planted(32, 1024, 128)
    keys = list(makers(["eqknobs"], ["topk", "topk+auxk"]))
    runner = makers(["eqknobs"], ["topk+auxk"])[("eqknobs", "topk+auxk")](task, data)
    raw, z = data.batch(0, task.batch)
    torch.testing.assert_close(z, (raw - data.mean) / data.std)
    runner.put_to_sleep()
    runner.step(raw, z)
    assert runner.dead() == task.features // 2
    times = sae_training.time_steps(task, data, keys, rounds=2, warm_up=1)
    assert set(times) == {*keys, sae_training.FLOOR} and min(times.values()) > 0


def test_batches_go_through_every_frame_once_an_epoch():
    data = sae_training.planted(8, 96, 16)
    seen = torch.cat([data.batch(number, 32)[0] for number in range(3)])
    assert torch.equal(torch.unique(seen, dim=0), torch.unique(data.raw, dim=0))
    assert not torch.equal(data.batch(0, 32)[0], data.batch(3, 32)[0])


def test_equal_time_ends_where_the_quickest_ends(monkeypatch):
    """Three seconds a step for one, one second for the other: when that one has done 30 steps, the first did 10."""
    pace = {("a", "topk"): 1.0, ("b", "topk"): 3.0}
    now = [0.0]

    class Runner:
        def __init__(self, key: tuple[str, str]):
            self.key = key

        def step(self, raw: torch.Tensor, z: torch.Tensor) -> None:
            now[0] += pace[self.key]

    monkeypatch.setattr(sae_training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sae_training, "score", lambda *_: (0.5, 4.0))
    monkeypatch.setattr(
        sae_training, "makers", lambda *_: {key: lambda task, data, key=key: Runner(key) for key in pace}
    )
    data = sae_training.planted(8, 64, 16)
    first, second = sae_training.train(Task(8, 16, 16, 2), data, list(pace), 31)
    assert first["equal_time"] == {"seconds": 30.0, "steps": 31, "fvu": 0.5, "l0": 4.0}
    assert second["equal_time"] == {"seconds": 30.0, "steps": 11, "fvu": 0.5, "l0": 4.0}
    assert np.isclose(first["fvu"], 0.5)


def test_what_cannot_be_imported_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sae_training.MODULES, "sae-lens", "no_such_module")
    assert sae_training.available(["eqknobs", "sae-lens"]) == ["eqknobs"]
    assert "left out: sae-lens (ModuleNotFoundError" in capsys.readouterr().out
