"""The small workflow through a real Slurm of one node: the same tables as on one machine."""

import filecmp
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import ROOT
from helpers.slurm import missing, one_node
from helpers.workflow import copy_workflow, snakemake, write_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
PROFILE = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())


LOCAL = {"importance", "quantisation", "accent", "speech_lm"}  # dear, and no other kind of job


def fewer(config: dict) -> None:
    config.update({stage: None for stage in config if stage in LOCAL or stage.startswith("lm_")})
    config["hardware"]["device"] = "auto"  # so that jobs ask for a GPU


@pytest.fixture(scope="module")
def through_slurm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """A folder in which the small workflow ran through Slurm, and what Slurm noted of each job."""
    folder = copy_workflow(tmp_path_factory.mktemp("slurm") / "work")
    write_config(folder, fewer)
    with one_node(tmp_path_factory.mktemp("node")) as node:
        command = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm"]
        command += ["--slurm-status-command=squeue", "--slurm-init-seconds-before-status-checks=2"]
        command += ["--seconds-between-status-checks=2"]
        env = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert not done.returncode, done.stdout[-3000:] + done.stderr[-6000:]
        jobs = (node / "jobs.txt").read_text().splitlines()
    return folder, [dict(re.findall(r"(\w+)=(\S+)", line)) for line in jobs]


def test_every_table_is_that_of_a_local_run(through_slurm, tmp_path: Path) -> None:
    local = copy_workflow(tmp_path / "work")
    write_config(local, fewer)
    snakemake(local, "--cores", "2")
    there, here = through_slurm[0] / "results/small/tables", local / "results/small/tables"
    names = sorted(path.name for path in here.iterdir())
    assert {"sae.csv", "probes.csv", "codec.csv", "steering.csv", "summary.json"} <= set(names)
    assert names == sorted(path.name for path in there.iterdir())
    assert filecmp.cmpfiles(here, there, names, shallow=False)[0] == names


def test_jobs_ask_for_what_the_profile_and_their_rules_say(through_slurm) -> None:
    _, jobs = through_slurm
    assert len(jobs) > 25 and {job["JobState"] for job in jobs} == {"COMPLETED"}
    asked = [job["Tres"] for job in jobs]
    assert {"gres/gpu=1" in tres for tres in asked} == {True, False}  # tables and report want none
    assert {re.search(r"mem=(\d+)M", tres)[1] for tres in asked} >= {"2000", "4000", "16000"}


def test_the_profile_names_rules_that_are() -> None:
    rules = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    named = set(re.findall(r"^\s*(?:rule|checkpoint) (\w+):", rules, re.M))
    assert set(PROFILE["set-resources"]) <= named | {"judgements"}
    assert "resources" not in PROFILE  # a sum of `gpu` would throttle the cluster
