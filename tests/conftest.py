"""One thread a process, unless the caller says otherwise: the tests' models are too small for more, and a second set of
threads slows both down."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Some virtual machines announce AMX and end the process at its first use, which is the first bfloat16 product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole small workflow has run to its report."""
    from helpers.workflow import copy_workflow, snakemake, write_config  # only now: the variables above come first

    folder = copy_workflow(tmp_path_factory.mktemp("finished") / "work")
    write_config(folder)
    snakemake(folder, "--cores", "2")
    return folder
