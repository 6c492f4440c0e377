"""The rehearsal's own parts, at tiny sizes: checkpoints, configurations, what is measured."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import rehearse
from eqknobs.config import settle
from eqknobs.forecast import Jobs
from eqknobs.io import read_csv
from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.strict_yaml import read_yaml
from helpers import ROOT
from helpers.moshi_world import KYUTAI, PERSONA, hub_layout


@pytest.mark.parametrize(("config", "dep_q"), [(KYUTAI, 8), (PERSONA, 16)], ids=["kyutai", "persona"])
def test_a_streamed_checkpoint_loads_and_is_the_same_again(tmp_path, config, dep_q, monkeypatch):
    monkeypatch.setattr(rehearse, "PIECE", 1000)  # every tensor in pieces
    for name in ("one", "two"):
        rehearse.write_moshi(tmp_path / name, 3, config, dep_q)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    rehearse.write_moshi(tmp_path / "other", 4, config, dep_q)
    assert (tmp_path / "other/model.safetensors").read_bytes() != one
    with safe_open(tmp_path / "one/model.safetensors", framework="pt") as file:
        for name, shape, mean, scale in hub_layout(config, dep_q):
            value = file.get_tensor(name)
            assert value.dtype == torch.bfloat16 and tuple(value.shape) == shape and value.isfinite().all()
            if value.numel() > 5000:
                assert value.float().mean().item() == pytest.approx(mean, abs=0.1 * scale)
                assert value.float().std().item() == pytest.approx(scale, rel=0.1)
    files = find_files("model", str(tmp_path / "one"))
    net = load_net(files)
    assert net.config.layers == config.layers and net.steps == 8


def test_pieces_are_rounded_to_the_nearest_bfloat16(tmp_path, monkeypatch):
    drawn = []

    class Same:
        def __init__(self, _bits):
            self.values = torch.linspace(-3, 3, 101)

        def standard_normal(self, size, dtype):
            drawn.append(size)
            return self.values[:size].numpy().copy()

    monkeypatch.setattr(rehearse.np.random, "Generator", Same)
    monkeypatch.setattr(rehearse, "PIECE", 60)
    rehearse.write_streamed(tmp_path / "x.safetensors", [("a", (10, 10), 0.0, 1.0)], 0)
    assert drawn == [60, 40]
    values = torch.linspace(-3, 3, 101)
    wanted = torch.cat([values[:60], values[:40]]).to(torch.bfloat16).view(10, 10)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], wanted)


@pytest.mark.parametrize("name", rehearse.CASES)
def test_a_rehearsed_configuration_is_the_shipped_one_but_for_paths_and_counts(name, tmp_path):
    case = rehearse.CASES[name]
    shipped = read_yaml(ROOT / f"config/{case.config}.yaml")
    config = rehearse.rehearsed(case, shipped, tmp_path, 1)
    whole = rehearse.merge(read_yaml(ROOT / "config/config.yaml"), config)
    settle(whole)  # raises where it contradicts itself
    assert set(whole["run"]["targets"]) == set(case.targets)
    assert whole["data"]["source"] == "folder" and whole["data"]["max_utterances"] == case.clips
    assert not any(c["source"] == "librispeech" for c in whole.get("corpora", {}).values())
    model = config["models"][case.model]
    assert model["path"] == str(tmp_path / case.model) and model["kind"] == case.kind
    own = next(iter(shipped["models"].values()))
    for key in ("nf4", "dtype", "stream"):
        assert model.get(key) == own.get(key)
    for stage, section in shipped.items():  # what is off stays off, and no size of a model or an SAE is touched
        if section is None:
            assert config[stage] is None
    for sae, section in (shipped.get("saes") or {}).items():
        if section:
            assert config["saes"][sae]["d_sae"] == section["d_sae"] and config["saes"][sae]["epochs"] <= 2
    for key in ("removed", "widths", "maps", "alphas"):
        for stage in ("importance", "quantisation", "steering"):
            if key in (shipped.get(stage) or {}):
                assert config[stage][key] == shipped[stage][key]


def test_peaks_are_those_of_descendants_since_the_last_look():
    busy = "start = time.process_time()\nwhile time.process_time() < start + 0.3: pass\n"
    code = f"import time\n{busy}x = bytearray(60_000_000)\ntime.sleep(4)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"]
    )
    with rehearse.Sampler(process.pid, every=0.02) as sampler:
        process.wait()
        used, after = sampler.take(), sampler.take()
    assert 60e6 < used.anonymous < 120e6 and used.total > used.anonymous
    assert 0.3 < used.cpu < 3  # two interpreters' starts besides
    assert after.anonymous == after.total == after.cpu == 0


def test_bytes_below_count_hard_links_once(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/c").write_bytes(b"x" * 10)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert rehearse.bytes_below(tmp_path) == 110


def records(stage, seconds, anonymous=1 << 30, **changes):
    row = {"stage": stage, "seconds": seconds, "disk": 1 << 29, "clips": 12, "audio_seconds": 60.0, "work": 60.0}
    return row | {"unit": "jobs", "anonymous": anonymous, "total": 2 * anonymous, "cpu": seconds / 2} | changes


def test_the_table_has_a_row_a_stage_and_a_case_replaces_its_own(tmp_path):
    rows = rehearse.table("mimi", [records("sae", 3.0), records("sae", 4.0, 3 << 30), records("report", 1.0)])
    assert list(rows.columns) == rehearse.COLUMNS and rows["stage"].tolist() == ["sae", "report"]
    sae = rows.iloc[0]
    assert sae["cpu_seconds"] == 3.5
    assert (sae["jobs"], sae["seconds"], sae["peak_anonymous_gib"], sae["peak_memory_gib"]) == (2, 7.0, 3.0, 6.0)
    assert sae["disk_gib"] == 1.0 and sae["measured_or_computed"] == "measured" and sae["kind"] == "mimi"
    path = tmp_path / "full_size.csv"
    rehearse.put(path, rows)
    rehearse.put(path, rehearse.table("dac", [records("sae", 9.0)]))
    rehearse.put(path, rehearse.table("mimi", [records("sae", 5.0)]))
    rehearse.put(path, rehearse.table("moshiko", [records("activations", 5.0), records("talk", 8.0)]))
    rehearse.put(path, rehearse.table("moshiko", [records("talk", 7.0)]))
    rehearse.put(path, rehearse.table("moshiko", [records("labels", 6.0)]))
    found = read_csv(path)
    assert found[["model", "stage", "seconds"]].values.tolist() == [
        ["dac", "sae", 9.0],
        ["mimi", "sae", 5.0],
        ["moshiko", "talk", 7.0],
        ["moshiko", "labels", 6.0],
    ]


def test_full_counts_are_computed_from_what_was_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = Jobs({"manifest": 1, "sae": 8, "probes": 3}, ("speech",))
    monkeypatch.setattr(rehearse, "count_jobs", lambda file: jobs)
    parts = [records("manifest", 2.0), records("sae", 6.0, work=1000.0)]
    rows = rehearse.computed(pd.concat([rehearse.table("mimi", parts), rehearse.table("dac", parts)]))
    assert list(rows.columns) == rehearse.COLUMNS and set(rows["measured_or_computed"]) == {"computed"}
    assert rows[["model", "stage"]].values.tolist() == [["mimi", "manifest"], ["mimi", "sae"]]  # no DAC is shipped
    sae = rows.iloc[1]
    assert (sae["clips"], sae["jobs"], sae["audio_seconds"]) == (500, 8, 6150.0)
    assert sae["cpu_seconds"] > 3 and sae["peak_memory_gib"] == 2 and sae["unit"].startswith("s of sound")


def test_the_committed_table_is_measured_at_full_size():
    path = ROOT / "benchmarks/results/full_size.csv"
    if not path.is_file():
        pytest.skip("benchmarks/results/full_size.csv is not made yet")
    rows = read_csv(path)
    assert list(rows.columns) == rehearse.COLUMNS
    assert set(rows["measured_or_computed"]) <= {"measured", "computed"}
    assert set(rows["model"]) <= {case.model for case in rehearse.CASES.values()}
    assert (rows[["jobs", "seconds", "peak_memory_gib"]] > 0).all(axis=None)
    assert not (rows["peak_anonymous_gib"] > rows["peak_memory_gib"]).any()  # not sampled where it is missing
