"""Loading needs the packed size and a few tensors of memory, however large the file is."""

import json
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.moshi_memory import write_large


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path):
    """The file has 2 GB; building the network first and packing it afterwards would need all of that."""
    size = write_large(tmp_path / "large")
    command = [sys.executable, "-m", "helpers.moshi_memory", str(tmp_path / "large")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    print(f"file {size / 1e9:.2f} GB, " + ", ".join(f"{key} {value / 1e9:.3f} GB" for key, value in seen.items()))
    assert size >= 2e9 and seen["packed"] < size / 2.5
    assert seen["peak"] <= seen["packed"] + 3 * seen["largest"] + 1e9
    assert seen["peak"] < size / 1.3  # the bound above would not notice it at this size
