"""The check for machines with a GPU, rehearsed without one: it runs, reports failures, compares tables."""

import csv
import io
import re
import subprocess
import zipfile

import pandas as pd
import pytest

import gpu_check
import gpu_wheels
from eqknobs.io import read_csv
from helpers import ROOT


def test_the_model_and_trainer_parts_run_at_tiny_sizes(tmp_path, capsys):
    out = tmp_path / "gpu_check.csv"
    status = gpu_check.main(["--cpu", "--parts", "moshi", "sae", "--out", str(out), "--work", str(tmp_path / "work")])
    rows = read_csv(out)
    assert status == 0 and list(rows.columns) == gpu_check.COLUMNS and set(rows["device"]) == {"cpu"}
    assert not rows["measure"].str.startswith("failed").any()
    for measure in ("load", "remove 4 heads", "pack 12 linears", "six dense products", "eqknobs topk, sparse products"):
        assert (rows["measure"] == measure).sum() == 1, measure
    assert rows["measure"].str.startswith("cache 2 s").sum() == 1
    assert (rows["measure"] == "streaming step, median").sum() == 3
    variants = {"topk", "topk+auxk", "batchtopk", "batchtopk+auxk", "jumprelu", "rms_l1"}
    assert {f"eqknobs {name}" for name in variants} <= set(rows["measure"])
    memory = rows["measure"].str.startswith("peak memory")
    assert rows.loc[memory, "value"].isna().all() and (rows.loc[~memory, "value"] > 0).all()


def test_the_committed_table_is_not_overwritten_by_a_rehearsal():
    with pytest.raises(SystemExit, match="measures nothing; name another --out"):
        gpu_check.main(["--cpu", "--parts", "sae"])


def test_a_part_that_fails_leaves_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(check):
        check.found("broken", "before", 1.0, "s")
        raise RuntimeError("out\nof memory")

    parts = {"broken": broken, "fine": lambda check: check.found("fine", "it", 2.0, "ms", limit=1)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    status = gpu_check.main(["--cpu", "--parts", "broken", "fine", "--out", str(tmp_path / "x.csv")])
    rows = read_csv(tmp_path / "x.csv")
    assert status == 1 and rows["part"].tolist() == ["broken", "broken", "broken", "fine", "fine"]
    assert rows["measure"][1] == "failed: RuntimeError: out of memory"
    assert rows["passed"].fillna("").astype(str).tolist() == ["", "False", "", "False", ""]


def test_tables_are_compared_number_by_number(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    base = pd.DataFrame({"sae": ["a", "b"], "fvu": [0.5, 1.0], "l0": [32.0, 30.0], "seconds": [1.0, 2.0]})
    for folder in (one, other):
        folder.mkdir()
    changed = base.assign(fvu=[0.51, 2.0], seconds=[9.0, 9.0])
    base.to_csv(one / "same.csv"), base.to_csv(other / "same.csv")
    base.to_csv(one / "sae.csv", index=False), changed.to_csv(other / "sae.csv", index=False)
    base.to_csv(one / "short.csv"), base[:1].to_csv(other / "short.csv")
    (
        base.assign(l0=[1.0, None]).to_csv(one / "gap.csv", index=False),
        base.assign(l0=[1.0, 2.0]).to_csv(other / "gap.csv", index=False),
    )
    found = {name: (apart, largest) for name, apart, largest in gpu_check.compare(one, other)}
    assert found["same.csv"] == (0.0, 0.0)
    assert found["sae.csv"] == (0.25, 0.5)  # of four numbers one is apart: .51 is close enough, seconds do not count
    assert found["short.csv"][0] == 1.0
    assert found["gap.csv"][0] == 0.25


def test_the_shell_script_says_how_it_is_used_and_passes_its_words_on(tmp_path):
    text = (ROOT / "tools/gpu_check.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "tools/gpu_check.sh"]).returncode == 0
    assert int(re.search(r"timeout (\d+)", text)[1]) <= 600
    assert "--no-index" in text and "HF_HUB_OFFLINE=1" in text


def test_wheels_lose_the_libraries_of_other_cards(tmp_path):
    wheel = tmp_path / "x-1-py3-none-any.whl"
    names = [
        "x/libbitsandbytes_cuda118.so",
        "x/libbitsandbytes_cuda130.so",
        "x/libbitsandbytes_cpu.so",
        "x/__init__.py",
    ]
    record = "".join(f"{name},,\n" for name in [*names, "x-1.dist-info/RECORD"])
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(name, name)
        file.writestr("x-1.dist-info/RECORD", record)
    gpu_wheels.thin(wheel)
    with zipfile.ZipFile(wheel) as file:
        left = [*names[1:], "x-1.dist-info/RECORD"]
        assert file.namelist() == left and file.read(names[1]).decode() == names[1]
        rows = list(csv.reader(io.StringIO(file.read("x-1.dist-info/RECORD").decode())))
        assert [row[0] for row in rows] == left


def test_what_travels_is_locked_and_small_enough():
    known = gpu_wheels.versions((ROOT / "requirements.txt").read_text())
    assert set(gpu_wheels.NEEDED) <= set(known)
    if (ROOT / ".git").exists():
        assert gpu_wheels.tree_bytes(ROOT) < gpu_wheels.LIMIT - (5 << 20) - (1 << 18)  # wheels take 5.2 MiB
