"""The rerun table: what each edit invalidates, as exact sets of (rule, wildcards)."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import snakemake, write_config

TARGET = "tiny-mimi.encoder_transformer"
PROPERTIES = ["centroid", "pitch", "rms"]
SAES = ["rms_l1", "topk"]

TABLES = {("tables", ""), ("report", "")}
CODEC = {("codec_renders", ""), ("judgements", "codec")}
STEERING_RENDERS = {("steering_renders", ""), ("judgements", "steering")}
STEERING = STEERING_RENDERS | {("steering_calibration", "")}
IMPORTANCE = {("importance_renders", ""), ("judgements", "importance")}
JUDGEMENTS = {("originals", ""), *(("judgements", stage) for stage in ("codec", "steering", "importance"))}
PROBES = {("probes", property) for property in PROPERTIES}
SCORED_SAES = {("sae_scores", "")} | CODEC  # the codec stage splices every SAE's reconstruction in
GRID = {("sae_grid", "topk")}
ALL_SAES = {("sae", f"{sae} {seed}") for sae in SAES for seed in (0, 1)}
FROM_CACHE = (
    {("activations", ""), ("labels", "")} | ALL_SAES | GRID | SCORED_SAES | PROBES | STEERING | IMPORTANCE | TABLES
)
EVERYTHING = {("manifest", "")} | FROM_CACHE | JUDGEMENTS


def planned(folder: Path) -> set[tuple[str, str]]:
    """(rule, wildcards) of every job that Snakemake would run now; the target is left out when it is the usual one."""
    found = set()
    for line in snakemake(folder, "--summary").stdout.splitlines():
        cells = line.split("\t")
        if len(cells) < 6 or cells[0] == "output_file" or cells[-1] == "no update":
            continue
        path, rule = cells[0].removeprefix("results/small/"), cells[2]
        wildcards = {
            "sae": r"saes/[^/]+/(\w+)/seed(\d+)/",
            "sae_grid": r"saes/[^/]+/(\w+)/grid/",
            "probes": r"(?:\.|/)(centroid|pitch|rms)\.(?:npz|csv)$",
            "judgements": r"\.(codec|steering|importance)\.words\.csv$",
        }.get(rule)
        label = " ".join(re.search(wildcards, path).groups()) if wildcards else ""
        other = "" if TARGET in path or not re.search(r"\.encoder_", path) else " (new target)"
        found.add((rule, label + other))
    return found


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, change)


def edit_file(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text() + text)

    return edit


def reorder_keys(folder: Path) -> None:
    path = folder / "config/config.yaml"
    config = yaml.safe_load(path.read_text())

    def flip(value: object) -> object:
        return {key: flip(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    path.write_text("# a comment\n" + yaml.safe_dump(flip(config), sort_keys=False))


def swap_sae_sizes(config: dict) -> None:
    topk, rms = config["saes"]["topk"], config["saes"]["rms_l1"]
    topk["epochs"], rms["epochs"] = 3, 4


def new_target(config: dict) -> None:
    config["run"]["targets"].append("tiny-mimi.encoder_layer.0")


ADDED_TARGET = {
    (rule, f"{wildcards} (new target)" if wildcards else " (new target)") for rule, wildcards in FROM_CACHE - TABLES
} | TABLES

CASES: dict[str, tuple[Callable[[Path], None], set[tuple[str, str]]]] = {
    "nothing": (lambda folder: None, set()),
    "key order and a comment": (reorder_keys, set()),
    "a whole float for an int": (edit_config(lambda c: c["labels"].update(floor_db=40.0)), set()),
    "a touched script": (lambda folder: (folder / "workflow/scripts/sae.py").touch(), set()),
    "a comment in a library module, taken back": (
        lambda folder: (
            edit_file("src/eqknobs/sae/topk.py", "# x\n")(folder),
            _restore(folder, "src/eqknobs/sae/topk.py"),
        ),
        set(),
    ),
    "SAE width": (
        edit_config(lambda c: c["saes"]["topk"].update(d_sae=384)),
        {("sae", "topk 0"), ("sae", "topk 1")} | GRID | SCORED_SAES | PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "a point of an SAE grid": (
        edit_config(lambda c: c["saes"]["topk"]["grid"].update(k=[8, 24])),
        GRID | {("report", "")},
    ),
    "second SAE seed": (
        edit_config(lambda c: c.update(sae_seeds=[0, 2])),
        {("sae", "topk 2"), ("sae", "rms_l1 2"), ("sae_scores", "")} | TABLES,
    ),
    "two SAEs trained differently": (
        edit_config(swap_sae_sizes),
        ALL_SAES | GRID | SCORED_SAES | PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "probe bins": (
        edit_config(lambda c: c["probes"].update(bins=9)),
        PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "an alpha added": (
        edit_config(lambda c: c["steering"]["alphas"].append(3)),
        STEERING_RENDERS | TABLES,
    ),
    "steering clip count": (edit_config(lambda c: c["steering"].update(clips=3)), STEERING_RENDERS | TABLES),
    "calibrated shift": (edit_config(lambda c: c["steering"].update(shift=0.8)), STEERING | TABLES),
    "another judge": (edit_config(lambda c: c["judges"].update(beam=2)), JUDGEMENTS | TABLES),
    "more random sets": (edit_config(lambda c: c["importance"].update(random_sets=3)), IMPORTANCE | TABLES),
    "bootstrap": (edit_config(lambda c: c["tables"].update(bootstrap=200)), TABLES),
    "label threshold": (
        edit_config(lambda c: c["labels"].update(periodicity=0.6)),
        {("labels", "")} | PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "seed": (edit_config(lambda c: c["run"].update(seed=1)), EVERYTHING),
    "a target added": (edit_config(new_target), ADDED_TARGET),
    "library: steering": (edit_file("src/eqknobs/steering.py", "\n# edited\n"), STEERING | TABLES),
    "library: report": (edit_file("src/eqknobs/report.py", "\n# edited\n"), {("report", "")}),
    "library: data": (edit_file("src/eqknobs/data.py", "\n# edited\n"), EVERYTHING),
    "library: not used by any stage": (edit_file("src/eqknobs/codec_training.py", "\n# edited\n"), set()),
}


def _restore(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text(path.read_text().removesuffix("# x\n"))


@pytest.fixture(scope="module")
def pristine(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, times kept, in which nothing is left to do."""
    folder = tmp_path_factory.mktemp("rerun") / "work"
    shutil.copytree(finished_run, folder, symlinks=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_an_edit_reruns_just_its_stages(name: str, pristine: Path) -> None:
    edit, expected = CASES[name]
    kept = {path: (path.read_text(), path.stat()) for path in _editable(pristine)}
    try:
        edit(pristine)
        assert planned(pristine) == expected
    finally:
        for path, (text, stat) in kept.items():
            if path.read_text() != text or path.stat().st_mtime_ns != stat.st_mtime_ns:
                path.write_text(text)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _editable(folder: Path) -> list[Path]:
    return [
        folder / "config/config.yaml",
        *(folder / "src").rglob("*.py"),
        *(folder / "workflow/scripts").glob("*.py"),
    ]
