"""A real Whisper, made from its package by a rule, is a model like any other of a configuration."""

from pathlib import Path

import pytest

from eqknobs.models.packaged import FILES
from helpers import ROOT
from helpers.workflow import copy_workflow, snakemake, write_config


def with_whisper(config: dict) -> None:
    config["run"]["targets"] = ["tiny.layer.*"]
    config["models"] = {"tiny": {"kind": "whisper", "path": "results/models/whisper-tiny.en", "revision": None}}
    config["data"] |= {"max_utterances": 3, "max_minutes": 1}
    for stage in (ROOT / "src/eqknobs/stages").iterdir():
        if stage.name in config:
            config[stage.name] = None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_workflow(tmp_path_factory.mktemp("whisper"))
    write_config(folder, with_whisper)
    snakemake(folder, "results/small/activations/tiny.layer.2.h5", "--cores", "1")
    return folder


def test_layers_are_known_before_the_model_is_made(run: Path) -> None:
    """All four came from one pass of a model that no configuration could look into."""
    made = {path.name for path in (run / "results/models/whisper-tiny.en").iterdir()}
    assert made == set(FILES)
    dry = snakemake(run, "caches", "--cores", "1", "--dry-run").stdout
    assert all(f"tiny.layer.{i}" in dry for i in range(4)) and "tiny.layer.4" not in dry


def test_a_made_model_reruns_nothing_and_another_conversion_does(run: Path) -> None:
    cache = "results/small/activations/tiny.layer.2.h5"
    assert "Nothing to be done" in snakemake(run, cache, "--cores", "1", "--dry-run").stdout
    code = run / "src/eqknobs/models/ctranslate2.py"
    text = code.read_text()
    code.write_text(text + "\nANOTHER = 1\n")
    dry = snakemake(run, cache, "--cores", "1", "--dry-run").stdout
    code.write_text(text)
    assert "Make the model whisper-tiny.en" in dry and "Cache activations of tiny.layer.2" in dry


def test_a_layer_that_it_has_not_is_refused(run: Path) -> None:
    given = '{"targets": ["tiny.layer.4"]}'
    said = snakemake(run, "--dry-run", "--cores", "1", "--config", f"run={given}", check=False).stdout
    assert "the model has layers 0 to 3" in said
