"""What a run is said to take: counted work, measured rates, and the sums of both."""

import copy

import pandas as pd
import pytest

from eqknobs import forecast
from eqknobs.cli import main
from eqknobs.config import merge, read_config
from eqknobs.errors import EqknobsError
from eqknobs.io import write_csv
from eqknobs.strict_yaml import read_yaml
from helpers import ROOT

SAID = """Building DAG of jobs...
Job stats:
job                count
---------------  -------
all                    1
activations            2
manifest               1
corpus_manifest        2
sae                    8
total                 14

[Thu Jan  1 00:00:00 1970]
Job 3: Draw the manifest
Reason: Missing output files: results/x/manifest/manifest.csv
Job 4: Draw the manifest of music
Job 5: Draw the manifest of heard
Job stats:
job                count
sae                   99
"""
MACHINE = "a processor, 2 cores, 24 GiB"


def measured(*rows):
    base = {"config": "librispeech-mimi", "model": "mimi", "kind": "mimi", "clips": 24, "audio_seconds": 100.0}
    base |= {"unit": "x", "peak_memory_gib": 2.0, "peak_anonymous_gib": 1.0, "device": "cpu", "machine": MACHINE}
    return pd.DataFrame([{**base, "measured_or_computed": "measured", **row} for row in rows])


ROWS = measured(
    {"stage": "manifest", "jobs": 1, "work": 1.0, "cpu_seconds": 2.0, "disk_gib": 0.0},
    {"stage": "label_search", "jobs": 1, "work": 1200.0, "cpu_seconds": 2.0, "disk_gib": 0.0},
    {"stage": "activations", "jobs": 1, "work": 100.0, "cpu_seconds": 12.0, "disk_gib": 0.01, "peak_memory_gib": 3.0},
    {"stage": "sae", "jobs": 4, "work": 1000.0, "cpu_seconds": 28.0, "disk_gib": 0.4},
)


@pytest.fixture
def config():
    over = read_yaml(ROOT / "config/librispeech-mimi.yaml")
    return merge(read_yaml(ROOT / "config/config.yaml"), copy.deepcopy(over))


def test_jobs_are_those_of_the_first_table_and_corpora_those_drawn():
    jobs = forecast.parse_jobs(SAID)
    assert jobs.by_stage == {"activations": 2, "manifest": 3, "sae": 8}
    assert jobs.corpora == ("heard", "music", "speech")


def test_sound_is_bounded_by_clips_and_by_minutes_and_a_union_is_its_parts(config):
    assert forecast.sound_seconds(config, ["speech"]) == pytest.approx(500 * 12.3)
    config["data"]["max_minutes"] = 10
    assert forecast.sound_seconds(config, ["speech"]) == 600
    config["corpora"] = {"music": {"source": "folder", "max_utterances": 10, "max_minutes": 60}}
    config["corpora"]["both"] = {"source": "union", "of": ["speech", "music"]}
    assert forecast.sound_seconds(config, ["both", "music"]) == 600 + 2 * 123
    config["corpora"]["said"] = {"source": "synthesis", "accents": ["a", "b"], "variants": ["c"] * 5, "count": 10}
    assert forecast.sound_seconds(config, ["said"]) == pytest.approx(2 * 5 * 10 * 12.3)


def test_time_grows_with_work_above_a_fixed_cost_and_disk_as_each_stage_says(config):
    config["data"]["max_minutes"] = 50  # 3000 s
    jobs = forecast.Jobs({"manifest": 1, "activations": 1, "sae": 8, "probes": 3}, ("speech",))
    rows = forecast.forecast(config, jobs, ROWS).set_index("stage")
    activations = rows.loc["activations"]
    assert activations["hours"] == pytest.approx((2 + (12 - 2) * 30) / 3600)
    assert activations["disk_gib"] == pytest.approx(0.3) and activations["peak_memory_gib"] == 3
    work = forecast.amount(config, "sae", 3000.0, 8)[0]
    assert work == pytest.approx(3000 * 8 * 80 * (3 * 8192 + 4096) / 4)
    assert rows.loc["sae", "hours"] == pytest.approx((8 * 2 + (28 - 4 * 2) * work / 1000) / 3600)
    assert rows.loc["sae", "disk_gib"] == pytest.approx(0.8)  # by jobs
    assert rows.loc["probes"].isna().sum() == 3  # never measured


def test_more_clips_epochs_and_targets_never_take_less(config):
    jobs = {"sae": 8, "probes": 3, "steering_renders": 1, "codec_renders": 1, "features": 1, "judgements": 1}
    few = {stage: forecast.amount(config, stage, 1000.0, count)[0] for stage, count in jobs.items()}
    for stage in ("codec", "steering", "importance"):
        config[stage]["clips"] *= 2
    config["probes"]["epochs"] *= 2
    config["saes"]["topk"]["epochs"] *= 2
    config["features"]["count"] *= 2
    for stage, count in jobs.items():
        assert forecast.amount(config, stage, 1000.0, count)[0] > few[stage], stage


def test_every_stage_of_the_shipped_configurations_can_be_counted(config):
    for stage in forecast.WORK:
        assert forecast.amount(config, stage, 1000.0, 2)[0] > 0 or stage in ("splicing", "domains"), stage


def test_the_text_says_where_it_is_from_and_what_is_assumed(config):
    text = forecast.lines(config, forecast.Jobs({"manifest": 1, "sae": 8, "probes": 3}, ("speech",)), ROWS)
    assert text[0].split() == ["stage", "jobs", "disk", "GiB", "memory", "GiB", "hours"]
    assert [line.split()[0] for line in text[1:5]] == ["manifest", "sae", "probes", "total"]
    assert text[3].split() == ["probes", "3", "-", "-", "-"] and "of stages that were measured" in text[4]
    assert text[5] == f"computed from mimi, measured on cpu: {MACHINE}"
    assert len(text) == 6 + len(forecast.ASSUMPTIONS) and all(line.startswith("assumed: ") for line in text[6:])


def test_the_models_own_measurement_is_taken_else_one_of_its_kind(config):
    other = ROWS.assign(model="another", config="x", machine="other")
    assert "a processor" in "\n".join(forecast.lines(config, forecast.Jobs({"sae": 1}, ()), pd.concat([other, ROWS])))
    assert "computed from another" in "\n".join(forecast.lines(config, forecast.Jobs({"sae": 1}, ()), other))
    none = ROWS.assign(model="dac", kind="dac")
    assert "jobs only" in "\n".join(forecast.lines(config, forecast.Jobs({"sae": 1}, ()), none))


def test_the_command_prints_a_plan_and_starts_nothing(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "full_size.csv", ROWS)
    monkeypatch.setattr(forecast, "MEASURED", tmp_path / "full_size.csv")
    monkeypatch.chdir(ROOT)
    before = set((ROOT / "results").glob("*")) if (ROOT / "results").is_dir() else set()
    main(["plan", "--config", "config/librispeech-mimi.yaml"])
    said = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in said}
    assert int(rows["sae"][0]) > 1 and rows["sae_grid"][1:] == ["-", "-", "-"] and float(rows["activations"][3]) > 0
    assert int(rows["total"][0]) == sum(int(cells[0]) for stage, cells in rows.items() if stage in forecast.WORK)
    assert (set((ROOT / "results").glob("*")) if (ROOT / "results").is_dir() else set()) == before


def test_what_cannot_be_planned_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(EqknobsError, match="no such table; run eqknobs plan in a checkout"):
        forecast.plan("config/config.yaml", read_config("config/config.yaml"), tmp_path / "none.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EqknobsError, match="no Snakefile here"):
        forecast.count_jobs("x.yaml")
    monkeypatch.chdir(ROOT)
    (tmp_path / "bad.yaml").write_text("saes: {topk: {lr: no}}\n")
    with pytest.raises(EqknobsError, match=r"bad\.yaml"):
        forecast.count_jobs(tmp_path / "bad.yaml")
