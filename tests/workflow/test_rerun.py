"""The rerun table: what each edit invalidates, as exact sets of (rule, wildcards)."""

import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers import ROOT
from helpers.slices import misfits, recorded, taken
from helpers.workflow import copy_workflow, snakemake, write_config

TARGET = "tiny-mimi.encoder_transformer"
PROPERTIES = ["centroid", "pitch", "rms"]
SAES = ["rms_l1", "topk"]

TABLES = {("tables", ""), ("report", "")}
JUDGED = {("judgements", "")}  # of all sounds; of those that did not change it writes what it knows
CODEC = {("codec_renders", "")} | JUDGED
STEERING_RENDERS = {("steering_renders", "")} | JUDGED
STEERING = STEERING_RENDERS | {("steering_calibration", "")}
ABLATIONS = {("importance_renders", "")} | JUDGED
TRIED_PLANS = {("quantisation_renders", "")} | JUDGED
QUANTISATION = {("quantisation_plans", "")} | TRIED_PLANS
IMPORTANCE = {("importance_maps", "")} | ABLATIONS | QUANTISATION  # plans by maps
JUDGEMENTS = {("originals", "")} | JUDGED
BASE_PROBES = {("probes", property) for property in PROPERTIES}
SAE_PROBES = {sae: {("sae_probes", f"{sae} {property}") for property in PROPERTIES} for sae in SAES}
PROBES = BASE_PROBES.union(*SAE_PROBES.values())
TOPK_PROBES = BASE_PROBES | SAE_PROBES["topk"]  # topk is probes.reference
PAGES = {("features", "")}
FOUND_AGAIN = {("stability", "")} | PAGES  # a page says what a feature's twin is
SOUGHT = {("label_search", "")} | PAGES  # and which label it tells best
ERASED = {("erasing", "")}
SAE_ROWS = {("sae_scores", "")} | FOUND_AGAIN | SOUGHT | ERASED
SCORED_SAES = SAE_ROWS | CODEC  # the codec stage splices every SAE's reconstruction in
GRID = {("sae_grid", "topk")}
ACCENT = {("accent", "")}
ACCENT_SPEECH = {("accent_speech", "")} | ACCENT
SPOKEN = {("speech_lm_answers", "")}  # its codec is a mimi
PRUNED = {("lm_pruning", "")}  # in orders that the probes of heads decide
QUANTISED = {("lm_quantisation", "")}  # whose plans the probes of layers and heads decide
STEERED = {("lm_steering", "")}
LM_READ = {(rule, "") for rule in ("lm_labels", "lm_layers", "lm_saes")} | PRUNED | QUANTISED | STEERED
LM_PROBES = LM_READ - {("lm_labels", "")}
LM = {("lm_caches", "")} | LM_READ
SENTENCES = {("corpus_manifest", "")} | LM
ALL_SAES = {("sae", sae) for sae in SAES}  # every seed
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
            "sae": r"saes/[^/]+/(\w+)/seed",
            "sae_grid": r"saes/[^/]+/(\w+)/grid/",
            "probes": r"(?:\.|/)(\w+)\.(?:npz|csv)$",
            "sae_probes": r"(?:probes\.|ridge\.|/)(\w+)(?:\.|/)(\w+)\.(?:npz|csv)$",
        }.get(rule)
        label = " ".join(re.search(wildcards, path).groups()) if wildcards else ""
        shared = TARGET in path or rule == "judgements" or not re.search(r"\.encoder_", path)
        other = "" if shared else " (new target)"
        found.add((rule, label + other))
    return found


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, change)


def edit_file(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text((path.read_text() if path.exists() else "") + text)

    return edit


def replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other content under the old time stamp, as `cp -p`, `rsync -a` and `tar` leave it."""

    def edit(folder: Path) -> None:
        path = folder / name
        stat = path.stat()
        path.write_bytes(change(path.read_bytes()))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return edit


def remove(pattern: str) -> Callable[[Path], None]:
    """The first file of a pattern is gone."""
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def lose_weights(folder: Path) -> None:
    remove(f"results/small/saes/{TARGET}/topk/seed0/sae.safetensors")(folder)


def other_weights(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def another_accent(data: bytes) -> bytes:
    assert b",US," in data
    return data.replace(b",US,", b",UK,", 1)


CLIP = "resources/corpus/101/1101/101-1101-0000.flac"
WEIGHTS = "resources/models/tiny-mimi/model.safetensors"
CODE = "\nEDITED = True\n"


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
    (rule, f"{wildcards} (new target)" if wildcards else " (new target)")
    for rule, wildcards in FROM_CACHE - JUDGED - TABLES
} | (JUDGED | TABLES)

EXTRA = {"variant": "rms_l1", "d_sae": 64, "l1": 0.1, "l1_on": "h", "lr": 0.001, "batch_size": 256, "epochs": 1}


def trained(sae: str) -> set[tuple[str, str]]:
    """What an SAE that is neither steered nor mapped makes run: its own rows, and what reads all SAEs."""
    own = {("sae", sae)} | {("sae_probes", f"{sae} {name}") for name in PROPERTIES}
    return own | SCORED_SAES | TABLES


def remove_sae(config: dict) -> None:
    """The one that is neither steered nor mapped once steering names the other."""
    config["steering"]["saes"] = ["topk"]
    del config["saes"]["rms_l1"]


def order(config: dict) -> None:
    """Every list whose order means nothing, the other way round."""
    config["sae_seeds"].reverse()
    config["saes"]["topk"]["grid"]["k"].reverse()
    for section, names in {
        "probes": ("properties", "lags", "l2"),
        "steering": ("saes", "alphas", "clamp_features"),
        "importance": ("maps", "removed", "modes"),
    }.items():
        for name in names:
            config[section][name].reverse()


def spelling(config: dict) -> None:
    config["data"]["labels"] = "./resources/corpus//labels.csv"
    config["models"]["tiny-mimi"]["path"] = "./resources/models/tiny-mimi/"


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
    "the machine": (edit_config(lambda c: c["hardware"].update(device="auto", vram_gb=24, shard_clips=5)), set()),
    "SAE width": (
        edit_config(lambda c: c["saes"]["topk"].update(d_sae=384)),
        {("sae", "topk")} | GRID | SCORED_SAES | TOPK_PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "a point of an SAE grid": (
        edit_config(lambda c: c["saes"]["topk"]["grid"].update(k=[8, 24])),
        GRID | {("report", "")},
    ),
    "another SAE seed, before which the first is taken from the store": (
        edit_config(lambda c: c.update(sae_seeds=[0, 2])),
        ALL_SAES | SCORED_SAES | PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "an SAE seed less": (
        edit_config(lambda c: c.update(sae_seeds=[0])),
        {("sae_scores", "")} | FOUND_AGAIN | TABLES,
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
    "another judge": (edit_config(lambda c: c["judges"].update(beam=2)), JUDGEMENTS | SPOKEN | LM | TABLES),
    "more random sets": (edit_config(lambda c: c["importance"].update(random_sets=3)), ABLATIONS | TABLES),
    "a map less": (edit_config(lambda c: c["importance"]["maps"].remove("fisher")), IMPORTANCE | TABLES),
    "a budget more": (edit_config(lambda c: c["quantisation"]["budgets"].append(2.5)), QUANTISATION | TABLES),
    "more packed clips": (edit_config(lambda c: c["quantisation"].update(clips=3)), TRIED_PLANS | TABLES),
    "library: plans": (edit_file("src/eqknobs/stages/quantisation/plans.py", CODE), QUANTISATION | TABLES),
    "library: what plans cost": (edit_file("src/eqknobs/stages/quantisation/tables.py", CODE), TABLES),
    "library: the ablations": (edit_file("src/eqknobs/stages/importance/compute.py", CODE), ABLATIONS | TABLES),
    "bootstrap": (edit_config(lambda c: c["tables"].update(bootstrap=200)), TABLES),
    "label threshold": (
        edit_config(lambda c: c["labels"].update(periodicity=0.6)),
        {("labels", "")} | PROBES | STEERING | IMPORTANCE | LM_READ | TABLES,
    ),
    "seed": (edit_config(lambda c: c["run"].update(seed=1)), EVERYTHING | SENTENCES | ACCENT_SPEECH),
    "an accent's SAEs": (edit_config(lambda c: c["accent"]["sae"].update(lr=0.01)), ACCENT | TABLES),
    "the level of accented speech": (
        edit_config(lambda c: c["accent"]["synthesis"].update(level_db=-20)),
        ACCENT_SPEECH | TABLES,
    ),
    "an accented clip lost": (remove("results/small/accent/corpus/*.flac"), ACCENT_SPEECH | TABLES),
    "no accent": (edit_config(lambda c: c.update(accent=None)), TABLES),
    "lags of a speech LM's layers": (
        edit_config(lambda c: c["lm_layers"].update(lags=[0, 1])),
        {("lm_layers", "")} | PRUNED | QUANTISED | TABLES,
    ),
    "shares of heads that go": (edit_config(lambda c: c["lm_pruning"]["heads"].update(shares=[0.4])), PRUNED | TABLES),
    "conditions that speak": (
        edit_config(lambda c: c["lm_pruning"].update(answered=["heads:random:*"])),
        PRUNED | TABLES,
    ),
    "no pruning": (edit_config(lambda c: c.update(lm_pruning=None)), TABLES),
    "library: what a pruned model is asked": (
        edit_file("src/eqknobs/speaking/prompts.py", CODE),
        SPOKEN | PRUNED | QUANTISED | STEERED | TABLES,
    ),
    "bits of a speech LM": (edit_config(lambda c: c["lm_quantisation"].update(group=32)), QUANTISED | TABLES),
    "no packed speech LM": (edit_config(lambda c: c.update(lm_quantisation=None)), TABLES),
    "a recovered speech LM": (
        edit_config(
            lambda c: c.update(lm_recipe=yaml.safe_load((ROOT / "config/config.yaml").read_text())["lm_recipe"])
        ),
        {("lm_recipe", "")} | TABLES,
    ),
    "how far a speech LM is steered": (
        edit_config(lambda c: c["lm_steering"]["shifts"].update(rms=2)),
        STEERED | TABLES,
    ),
    "library: directions of a speech LM": (
        edit_file("src/eqknobs/stages/lm_steering/directions.py", CODE),
        STEERED | TABLES,
    ),
    "library: the report on a steered speech LM": (
        edit_file("src/eqknobs/stages/lm_steering/section.py", CODE),
        {("report", "")},
    ),
    "no steered speech LM": (edit_config(lambda c: c.update(lm_steering=None)), TABLES),
    "library: memory and time of a pruned model": (
        edit_file("src/eqknobs/stages/lm_pruning/footprint.py", CODE),
        PRUNED | TABLES,
    ),
    "SAEs of a speech LM": (
        edit_config(lambda c: c["lm_layers"]["sae"].update(k=9)),
        {("lm_saes", "")} | STEERED | TABLES,
    ),
    "text tokens told apart": (edit_config(lambda c: c["lm_layers"].update(tokens=9)), LM_READ | TABLES),
    "how far a monologue leads": (edit_config(lambda c: c["lm_layers"].update(lead=1)), LM | TABLES),
    "when a word is spoken": (
        replace("resources/sentences/joe/00000.json", lambda data: data.replace(b"[5, ", b"[6, ")),
        SPOKEN | LM | TABLES,
    ),
    "order that means nothing": (edit_config(order), set()),
    "other spellings of paths": (edit_config(spelling), set()),
    "keys of other sources": (edit_config(lambda c: c["data"].update(subset="dev-clean")), set()),
    "how speech is downloaded": (
        edit_config(lambda c: c["data"].update(url="https://example.org", timeout_seconds=9)),
        set(),
    ),
    "a limit of minutes that does not bind": (
        edit_config(lambda c: c["data"].update(max_minutes=90)),
        {("report", "")},
    ),
    "a limit of minutes that binds": (edit_config(lambda c: c["data"].update(max_minutes=1)), EVERYTHING),
    "no codec stage": (edit_config(lambda c: c.update(codec=None)), JUDGED | TABLES),
    "no steering": (edit_config(lambda c: c.update(steering=None)), JUDGED | TABLES),
    "no importance": (edit_config(lambda c: c.update(importance=None)), QUANTISATION | TABLES),
    "no quantisation": (edit_config(lambda c: c.update(quantisation=None)), JUDGED | TABLES),
    "no probes": (edit_config(lambda c: c.update(probes=None, steering=None, importance=None)), QUANTISATION | TABLES),
    "no SAEs": (
        edit_config(lambda c: c.update(saes=None, importance=None) or c["steering"].update(saes=[])),
        CODEC | BASE_PROBES | STEERING | QUANTISATION | TABLES,
    ),
    "an SAE removed": (edit_config(remove_sae), SCORED_SAES | STEERING | TABLES),
    "an SAE less in the codec": (edit_config(lambda c: c["codec"].update(saes=["topk"])), CODEC | TABLES),
    "an SAE less in steering": (edit_config(lambda c: c["steering"].update(saes=["topk"])), STEERING | TABLES),
    "all targets, written out": (edit_config(lambda c: c["steering"].update(targets=[TARGET])), {("report", "")}),
    "a property less": (
        edit_config(lambda c: c["probes"].update(properties=["pitch", "centroid"])),
        STEERING_RENDERS | TABLES,
    ),
    "another property's strength": (
        edit_config(lambda c: c["steering"]["other_alpha"].update(rms=3)),
        STEERING_RENDERS | TABLES,
    ),
    "the word threshold": (edit_config(lambda c: c["tables"].update(unmeasurable_wer=0.4)), TABLES),
    "a check": (edit_file("src/eqknobs/stages/steering/checks.py", CODE), set()),
    "library: the judges": (edit_file("src/eqknobs/sound/judges.py", CODE), JUDGEMENTS | SPOKEN | LM | TABLES),
    "library: the judge of quality": (
        edit_file("src/eqknobs/sound/quality.py", CODE),
        JUDGEMENTS | SPOKEN | PRUNED | QUANTISED | STEERED | TABLES,
    ),
    "the schema": (edit_file("src/eqknobs/schema.py", CODE), set()),
    "a target added": (edit_config(new_target), ADDED_TARGET),
    "library: steering": (edit_file("src/eqknobs/stages/steering/compute.py", CODE), STEERING | TABLES),
    "library: report": (edit_file("src/eqknobs/report/page.py", CODE), {("report", "")}),
    "library: a stage's tables": (edit_file("src/eqknobs/stages/steering/tables.py", CODE), TABLES),
    "library: a stage's figures": (edit_file("src/eqknobs/stages/steering/section.py", CODE), {("report", "")}),
    "a stage's text": (edit_file("src/eqknobs/stages/importance/section.html.j2", "<p>x</p>"), {("report", "")}),
    "library: data": (edit_file("src/eqknobs/corpus/manifest.py", CODE), EVERYTHING | SENTENCES | ACCENT_SPEECH),
    "library: the model's kind": (
        edit_file("src/eqknobs/models/mimi.py", CODE),
        FROM_CACHE | JUDGED | SPOKEN | LM | ACCENT,
    ),
    "library: another kind of model": (edit_file("src/eqknobs/models/moshi/network.py", CODE), SPOKEN | LM | TABLES),
    "another θ": (
        edit_config(lambda c: c["stability"].update(thetas=[0.4])),
        FOUND_AGAIN | TABLES,
    ),
    "library: overlap of features": (
        edit_file("src/eqknobs/stages/stability/compute.py", CODE),
        FOUND_AGAIN | TABLES,
    ),
    "from how few features labels are told": (
        edit_config(lambda c: c["erasing"].update(kept=[2])),
        ERASED | TABLES,
    ),
    "a task less": (edit_config(lambda c: c["erasing"]["tasks"].update(speech=["sex"])), ERASED | TABLES),
    "when a label is gone": (edit_config(lambda c: c["erasing"].update(tolerance=0.1)), TABLES),
    "library: what erases": (edit_file("src/eqknobs/stages/erasing/probes.py", CODE), ERASED | TABLES),
    "library: figures of what is erased": (
        edit_file("src/eqknobs/stages/erasing/section.py", CODE),
        {("report", "")},
    ),
    "no erasing": (edit_config(lambda c: c.update(erasing=None)), TABLES),
    "fewer pages of features": (edit_config(lambda c: c["features"].update(count=1)), PAGES | TABLES),
    "library: what features hear": (edit_file("src/eqknobs/stages/features/compute.py", CODE), PAGES | TABLES),
    "library: pages of features": (edit_file("src/eqknobs/stages/features/pages.py", CODE), {("report", "")}),
    "the text of pages of features": (
        edit_file("src/eqknobs/stages/features/pages.html.j2", "<p>x</p>"),
        {("report", "")},
    ),
    "a window of a feature lost": (remove(f"results/small/renders/{TARGET}/features/*.flac"), PAGES | TABLES),
    "no pages of features": (edit_config(lambda c: c.update(features=None)), TABLES),
    "library: scores of SAEs": (edit_file("src/eqknobs/stages/saes/compute.py", CODE), {("sae_scores", "")} | TABLES),
    "library: one variant of SAEs, which all load": (
        edit_file("src/eqknobs/sae/topk.py", CODE),
        ALL_SAES | GRID | SCORED_SAES | PROBES | STEERING | IMPORTANCE | LM_PROBES | ACCENT | TABLES,
    ),
    "a comment in a library module that all import": (edit_file("src/eqknobs/errors.py", "\n# edited\n"), set()),
    "code, time kept": (
        replace("src/eqknobs/report/page.py", lambda data: data + CODE.encode()),
        {("report", "")},
    ),
    "a sound replaced, time kept": (replace(CLIP, lambda data: data[:-1] + b"?"), EVERYTHING),
    "a sound added": (lambda folder: shutil.copy2(folder / CLIP, folder / "resources/corpus/101/new.flac"), EVERYTHING),
    "a sound removed": (remove(CLIP), EVERYTHING),
    "a note beside the speech": (edit_file("resources/corpus/101/readme.txt", "x"), set()),
    "a docstring": (replace("src/eqknobs/io.py", lambda data: data.replace(b'"""', b'"""Said otherwise: ', 1)), set()),
    "another spelling of a path": (
        edit_config(lambda c: c["data"].update(path="./resources//corpus/")),
        set(),
    ),
    "a transcript": (edit_file("resources/corpus/101/1101/101-1101.trans.txt", "x"), EVERYTHING),
    "an undrawn file of another kind": (edit_file("resources/corpus/README.md", "x"), set()),
    "sounds touched": (lambda folder: [path.touch() for path in folder.glob("resources/corpus/*/*/*.flac")], set()),
    "labels: a blank line": (edit_file("resources/corpus/labels.csv", "\n"), set()),
    "labels: a cell, time kept": (replace("resources/corpus/labels.csv", another_accent), EVERYTHING),
    "model touched": (lambda folder: (folder / WEIGHTS).touch(), set()),
    "other weights, time kept": (replace(WEIGHTS, other_weights), FROM_CACHE | JUDGED | ACCENT),
    "SAE weights lost, which nothing is to read": (lose_weights, set()),
    "SAE weights lost, and a stage that reads them is to run": (
        lambda folder: (lose_weights(folder), edit_config(lambda c: c["codec"].update(clips=1))(folder)),
        {("sae", "topk")} | SCORED_SAES | TOPK_PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "a sound of the page lost": (remove("results/small/report/audio/*"), {("report", "")}),
    "a stage's page lost": (remove("results/small/report/probes.html"), {("report", "")}),
    "a steered sound lost": (remove(f"results/small/renders/{TARGET}/steering/*/*.flac"), STEERING_RENDERS | TABLES),
    "library: not used by any stage": (edit_file("src/eqknobs/stages/codec_training/training.py", CODE), set()),
    "an SAE added": (edit_config(lambda c: c["saes"].update(extra=EXTRA)), trained("extra")),
    "an SAE that is steered and not mapped changed": (
        edit_config(lambda c: c["saes"]["rms_l1"].update(epochs=3)),
        {("sae", "rms_l1")} | SCORED_SAES | SAE_PROBES["rms_l1"] | STEERING | TABLES,
    ),
    "another reference of the same spaces": (
        edit_config(lambda c: c["probes"].update(reference="rms_l1")),
        BASE_PROBES | STEERING | IMPORTANCE | TABLES,
    ),
    "a property added": (
        edit_config(lambda c: c["probes"]["properties"].append("sex")),
        {("probes", "sex"), *(("sae_probes", f"{sae} sex") for sae in SAES)} | TABLES,
    ),
    "a property removed": (
        edit_config(lambda c: c["probes"]["properties"].remove("pitch")),
        STEERING_RENDERS | TABLES,
    ),
}


def _restore(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text(path.read_text().removesuffix("# x\n"))


@pytest.fixture(scope="module")
def pristine(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run and of what it read, times kept, in which nothing is left to do."""
    folder = tmp_path_factory.mktemp("rerun") / "work"
    shutil.copytree(finished_run, folder, symlinks=True)
    (folder / "resources").unlink()
    shutil.copytree(ROOT / "resources", folder / "resources")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_an_edit_reruns_just_its_stages(name: str, pristine: Path) -> None:
    edit, expected = CASES[name]
    kept = {path: (path.read_bytes(), path.stat()) for path in _editable(pristine)}
    try:
        edit(pristine)
        assert planned(pristine) == expected
    finally:
        for path in _editable(pristine) - kept.keys():
            path.unlink()
        for path, (data, stat) in kept.items():
            if not path.exists() or path.read_bytes() != data or path.stat().st_mtime_ns != stat.st_mtime_ns:
                path.write_bytes(data)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def third_sae(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run in which one more SAE, neither steered nor mapped, was trained and probed.

    Codec, tables and report, which read every SAE, are left undone: they are to run whatever is done to it.
    """
    folder = tmp_path_factory.mktemp("third") / "work"
    shutil.copytree(finished_run, folder, symlinks=True)
    write_config(folder, lambda config: config["saes"].update(extra=EXTRA))
    snakemake(folder, "--cores", "2", "dictionaries", "probings")
    assert planned(folder) == CODEC | FOUND_AGAIN | SOUGHT | ERASED | TABLES
    return folder


OF_THE_THIRD: dict[str, tuple[Callable[[dict], object], set[tuple[str, str]]]] = {
    "removed": (lambda saes: None, {("sae_scores", "")} | TABLES),  # the others never read it
    "renamed": (lambda saes: saes.update(other=EXTRA), trained("other")),
    "changed": (lambda saes: saes.update(extra={**EXTRA, "epochs": 2}), trained("extra")),
}


@pytest.mark.parametrize("name", OF_THE_THIRD)
def test_an_sae_that_is_neither_steered_nor_mapped_reruns_only_its_rows(name: str, third_sae: Path) -> None:
    edit, expected = OF_THE_THIRD[name]
    write_config(third_sae, lambda config: edit(config["saes"]))
    assert planned(third_sae) == expected


def _editable(folder: Path) -> set[Path]:
    parts = ["config", "src", "workflow/scripts", "resources", "results/small"]
    files = {path for part in parts for path in (folder / part).rglob("*") if path.is_file()}
    return files | {folder / ".snakemake/eqknobs-digests.json"}


def test_what_is_lost_is_made_again_once(pristine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(pristine, folder, symlinks=True)
    sound = sorted(folder.glob(f"results/small/renders/{TARGET}/codec/*/*.flac"))[0]
    data = sound.read_bytes()
    sound.unlink()
    snakemake(folder, "--cores", "2", f"results/small/scores/{TARGET}.codec.words.csv")
    assert sound.read_bytes() == data
    assert planned(folder) <= TABLES  # whose input is newer now


def test_a_replaced_archive_is_drawn_from_again(tmp_path: Path) -> None:
    """And of the same archive, touched, nothing is done again."""
    folder = copy_workflow(tmp_path / "work")

    def archive(config: dict) -> None:
        config["data"].update(source="archive", path="speech.tar", labels=None)

    write_config(folder, archive)

    def pack(speakers: str) -> None:
        with tarfile.open(folder / "speech.tar", "w") as tar:
            for speaker in speakers.split():
                tar.add(ROOT / "resources/corpus" / speaker, speaker)

    manifest = folder / "results/small/manifest/manifest.csv"
    pack("101 102 103")
    os.utime(folder / "speech.tar", (1e9, 1e9))
    snakemake(folder, "--cores", "1", "manifests")
    before = manifest.read_text()
    (folder / "speech.tar").touch()
    assert "Nothing to be done" in snakemake(folder, "--cores", "1", "manifests").stderr
    pack("101 102 104")
    os.utime(folder / "speech.tar", (1e9, 1e9))
    snakemake(folder, "--cores", "1", "manifests")
    assert manifest.read_text() != before and "/104/" in manifest.read_text()


def test_snakemakes_own_report_holds_the_sounds_that_its_page_links(finished_run: Path) -> None:
    snakemake(finished_run, "--report", "report.zip")
    with zipfile.ZipFile(finished_run / "report.zip") as packed:
        names = set(packed.namelist())
        (index,) = (name for name in names if name.endswith("/index.html"))
        folder = index.removesuffix("index.html")
        pages = {name for name in names if name.startswith(folder) and name.endswith(".html")}
        text = "".join(packed.read(page).decode() for page in pages)
        links = set(re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', text))
        sounds = {link for link in links if link.startswith("audio/")}
        assert len(sounds) > 20 and len(pages) > 5 and {folder + link for link in links - sounds} == pages
        assert {folder + link for link in links} == names - {"report/report.html", f"{folder}config.yaml"}
        sound = packed.read(folder + min(sounds))
    assert sound == (finished_run / "results/small/report" / min(sounds)).read_bytes()


def test_the_slices_of_jobs_are_what_their_scripts_say_that_they_take(finished_run: Path) -> None:
    slices = recorded(finished_run)
    assert len(slices) > 15
    shared = {"sae_probes": "probes", "corpus_manifest": "manifest", "corpus_originals": "originals"}
    scripts = {rule: shared.get(rule, rule) for rule in slices}
    assert [text for rule, found in slices.items() for text in misfits(found, taken(scripts[rule]), rule)] == []


def test_a_page_that_is_gone_is_written_again(pristine: Path) -> None:
    page = pristine / "results/small/report/index.html"
    kept = page.rename(page.with_suffix(".kept"))
    try:
        assert planned(pristine) == {("report", "")}
    finally:
        kept.rename(page)
