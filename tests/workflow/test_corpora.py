"""Corpora beside the speech: own manifests and splits, SAEs and probes that hear them; unions of several."""

import shutil
from pathlib import Path

import h5py
import pytest

from eqknobs.io import read_csv
from helpers import ROOT
from helpers.workflow import copy_workflow, snakemake, write_config

TARGET = "tiny-mimi.encoder_transformer"
SAID = {"accents": ["en-us", "en-029"], "variants": ["m1", "f1", "m2"], "count": 4}
SAID |= {"splits": {"train": 0.34, "val": 0.33, "test": 0.33}}
SAID_MANIFEST = "results/small/manifest/said/manifest.csv"


def with_corpora(config: dict) -> None:
    """Two corpora of six voices each and both together, one that espeak-ng says; an SAE on both, probes on one and on
    both."""
    config["data"].update(path="one", labels=None, max_utterances=18)
    config["corpora"] = {
        "other": config["data"] | {"path": "two"},
        "mix": {"source": "union", "of": ["other", "speech"]},
        "said": {"source": "synthesis"} | config["accent"]["synthesis"] | SAID,
    }
    config["saes"] = {"topk": config["saes"]["topk"] | {"corpus": "mix", "grid": None}}
    config["sae_seeds"] = [0]
    config["probes"].update(properties=["centroid"], corpora=["mix", "other"], saes=["topk"])
    config["codec"].update(corpora=["other"], clips=1)
    off = (
        "steering",
        "importance",
        "quantisation",
        "speech_lm",
        "lm_layers",
        "lm_pruning",
        "lm_quantisation",
        "lm_recipe",
        "lm_steering",
        "splicing",
    )
    config.update(dict.fromkeys(off))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_workflow(tmp_path_factory.mktemp("corpora") / "work")
    for name, first in (("one", 101), ("two", 107)):
        for speaker in range(first, first + 6):
            shutil.copytree(ROOT / f"resources/corpus/{speaker}", folder / name / str(speaker))
    write_config(folder, with_corpora)
    judged = f"results/small/scores/{TARGET}@other.codec.words.csv"
    snakemake(folder, "--cores", "2", "dictionaries", "probings", judged, SAID_MANIFEST)
    return folder


def test_a_union_keeps_every_clip_and_its_split(run: Path) -> None:
    manifests = run / "results/small/manifest"
    speech, other, mix = (read_csv(manifests / name / "manifest.csv") for name in ("", "other", "mix"))
    assert len(mix) == len(speech) + len(other) == 36
    assert mix["domain"].value_counts().to_dict() == {"other": 18, "speech": 18}
    splits = dict(zip("speech-" + speech["id"], speech["split"])) | dict(zip("other-" + other["id"], other["split"]))
    assert dict(zip(mix["id"], mix["split"])) == splits
    assert mix.groupby("speaker")["split"].nunique().max() == 1


def test_synthetic_speech_is_a_corpus(run: Path) -> None:
    said = read_csv(run / SAID_MANIFEST)
    assert set(said["accent"]) == set(SAID["accents"]) and set(said["speaker"]) == set(SAID["variants"])
    assert said.groupby(["speaker", "text"])["accent"].nunique().unique().tolist() == [2]
    assert all((run / path).is_file() for path in said["path"])


def test_stages_hear_the_corpora_that_they_list(run: Path) -> None:
    results = run / "results/small"
    caches = {path.name for path in (results / "activations").glob("*.h5") if not path.name.startswith(".")}
    assert caches == {f"{TARGET}@mix.h5", f"{TARGET}@other.h5"}  # of speech alone nobody asks for
    with h5py.File(results / f"activations/{TARGET}@mix.h5") as file:
        assert len(file["utterances/id"]) == 36
    assert [path.parent.parent.parent.name for path in results.glob("saes/*/topk/seed0/config.json")] == [
        f"{TARGET}@mix"
    ]
    for corpus in ("mix", "other"):
        scores = read_csv(results / f"scores/{TARGET}@{corpus}.probes.centroid.csv")
        assert set(scores["id"]) <= set(read_csv(results / f"manifest/{corpus}/manifest.csv")["id"])


def test_sound_of_a_corpus_is_judged_against_its_own_transcripts(run: Path) -> None:
    """Spliced in is the SAE that was trained on both."""
    scores = run / "results/small/scores"
    judged, originals = read_csv(scores / f"{TARGET}@other.codec.words.csv"), read_csv(scores / "originals.other.csv")
    manifest = read_csv(run / "results/small/manifest/other/manifest.csv")
    assert set(originals["id"]) == set(manifest.loc[manifest["split"] == "test", "id"]) >= set(judged["id"])
    assert any("topk" in name for name in judged["condition"])


def test_another_draw_of_one_corpus_leaves_the_others_alone(run: Path) -> None:
    def fewer(config: dict) -> None:
        with_corpora(config)
        config["corpora"]["other"]["max_utterances"] = 12

    write_config(run, fewer)
    (run / read_csv(run / SAID_MANIFEST)["path"].iloc[0]).unlink()  # which has it said again
    lines = snakemake(run, "--summary", "dictionaries", "probings", SAID_MANIFEST).stdout.splitlines()
    stale = {line.split("\t")[0] for line in lines if line.endswith("update pending")}
    write_config(run, with_corpora)
    assert (
        f"results/small/activations/{TARGET}@other.h5" in stale and "results/small/manifest/manifest.csv" not in stale
    )
    assert SAID_MANIFEST in stale
