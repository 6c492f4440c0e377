"""One GPU, one job on it: also with many cores, and also when the user says nothing of resources."""

from itertools import pairwise
from pathlib import Path

import pytest

from helpers.workflow import copy_workflow, snakemake, write_config

SNAKEFILE = """
configfile: "config/config.yaml"


include: "rules/common.smk"


rule all:
    input:
        expand("interval{i}", i=range(3)),


rule job:
    output:
        "interval{i}",
    resources:
        gpu=gpu,
    shell:
        "date +%s.%N > {output}; sleep 0.7; date +%s.%N >> {output}"
"""


def overlaps(folder: Path, device: str, *arguments: str) -> bool:
    copy_workflow(folder)
    write_config(folder, lambda config: config["hardware"].update(device=device))
    (folder / "Snakefile").write_text(SNAKEFILE)
    snakemake(folder, "--cores", "4", *arguments)
    intervals = sorted(tuple(map(float, (folder / f"interval{i}").read_text().split())) for i in range(3))
    return any(a[1] > b[0] for a, b in pairwise(intervals))


@pytest.mark.parametrize("arguments", [(), ("--resources", "mem_mb=4000"), ("--resources", "gpu=1")])
def test_gpu_jobs_never_overlap(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert not overlaps(tmp_path / "work", "auto", *arguments)


def test_cpu_jobs_run_side_by_side(tmp_path: Path) -> None:
    assert overlaps(tmp_path / "work", "cpu")
