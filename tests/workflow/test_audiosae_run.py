"""config/audiosae-whisper.yaml and config/audiosae-hubert.yaml, shrunk, on tiny random models of the hub's format.

A job costs more than what it computes here, so each runs what the other does not: Whisper is spliced and has its
features told apart by domain, HuBERT has two seeds compared. Searches, phones and pages: the small workflow.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
import yaml
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor, WhisperConfig, WhisperModel

from eqknobs.models.ctranslate2 import convert_whisper
from eqknobs.models.packaged import PACKAGED, package_files
from helpers import ROOT
from helpers.slices import misfits, recorded, taken
from helpers.workflow import copy_workflow, snakemake

WIDTH, FEATURES, LAYER = 16, 48, 2
OFF = {"whisper": ("label_search", "features", "stability"), "hubert": ("label_search", "features", "domains")}


def write_whisper(folder: Path) -> None:
    """Three layers of random weights, with the tokeniser that comes with tiny.en."""
    parts = package_files("whisper-tiny.en")
    convert_whisper(parts, parts[-1].parent, folder, PACKAGED["whisper-tiny.en"].sha256)
    sizes = dict(encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=51864)
    net = WhisperModel(WhisperConfig(d_model=WIDTH, decoder_start_token_id=50257, **sizes))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.decoder.embed_tokens.weight.data[50256] *= 8  # so that a text ends before its 224th token
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder)


def write_hubert(folder: Path) -> None:
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    HubertModel(HubertConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


WRITE: dict[str, tuple[Callable[[Path], None], str]] = {
    "whisper": (write_whisper, "whisper-small"),
    "hubert": (write_hubert, "hubert-base"),
}


def shrink(kind: str, model: str) -> dict:
    """The shipped configuration with one layer of a tiny model, a few bundled clips, and one corpus for all stages."""
    config = yaml.safe_load((ROOT / f"config/audiosae-{kind}.yaml").read_text())
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    layers = config["run"]["targets"]
    assert layers == [f"{model}.layer.{i}" for i in range(12)]
    config["run"]["targets"] = [layers[LAYER]]
    config["models"][model]["path"] = "model"
    config["data"] = default["data"] | {"max_utterances": 16, "max_minutes": 1}
    for corpus in config["corpora"].values():
        corpus |= {} if "of" in corpus else {"max_utterances": 12}
    config["saes"]["audiosae"] |= {"d_sae": FEATURES, "k": 4, "epochs": 1, "batch_size": 256}
    config["sae_seeds"] = [0, 1] if kind == "hubert" else [0]
    config["hardware"] = {"threads": 1}
    config["tables"] = {"bootstrap": 100}
    config["corpora"]["heard"]["of"] = ["music", "sounds", "talk"]
    if kind == "whisper":
        config["splicing"] |= {"clips": 2, "non_speech": ["music"]}
        config["domains"] |= {"corpus": "heard", "permutations": 4, "resamples": 10}
        config["hallucination"] |= {"layers": [LAYER], "counts": [4], "alphas": [1], "label": "speech", "listen": 1}
        config["hallucination"] |= {"clips": {"train": 1, "val": 1, "test": 1}, "speech": {"val": 1, "test": 1}}
        config["hallucination"] |= {"held_out": ["minetest-data", "singularity-music"], "max_tokens": 5}
        config["hallucination"]["rivals"] |= {"alphas": [1], "heads": [1], "seeds": 1}
    else:
        config["stability"] |= {"resamples": 20, "min_firings": 5, "shifts": 1}
    return config | dict.fromkeys(OFF[kind])


class Ran(NamedTuple):
    """The kind of a model, the tables of its shrunken configuration, and the folder in which it ran."""

    kind: str
    tables: dict[str, pd.DataFrame]
    folder: Path


@pytest.fixture(scope="module", params=sorted(WRITE))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    kind = request.param
    folder = copy_workflow(tmp_path_factory.mktemp(kind) / "work")
    write, model = WRITE[kind]
    torch.manual_seed(0)
    write(folder / "model")
    config = shrink(kind, model)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    tables = folder / "results" / config["run"]["name"] / "tables"
    snakemake(folder, f"{tables.relative_to(folder)}/sae.csv", "--cores", "1", "--configfile", "run.yaml")
    return Ran(kind, {path.stem: pd.read_csv(path) for path in tables.glob("*.csv")}, folder)


def test_both_run_to_their_tables(run: Ran) -> None:
    kind, tables, _ = run
    sae = tables["sae"]
    assert set(sae["target"]) == {f"{WRITE[kind][1]}.layer.{LAYER}@heard"}
    assert set(sae["layer"]) == {LAYER} and set(sae["d_in"]) == {WIDTH} and set(sae["d_sae"]) == {FEATURES}
    assert sae["fvu"].between(0, 1).all() and sae["l0"].between(2, 8).all()
    heard = sae[sae["split"] == "test"][["wer_text_spliced", "nll_spliced", "no_speech_auc"]]
    assert (heard.notna() if kind == "whisper" else heard.isna()).all(axis=None)
    if kind == "whisper":
        spliced = tables["splicing"]
        assert set(spliced["arm"]) == {"unspliced", "mean", "sae", "untrained"}
        assert set(spliced["clips"]) == {2} and set(spliced["non_speech"]) == {2}
        found = tables["hallucination"]
        assert set(found["target"]) == {"whisper-small"} and set(found["split"]) == {"val", "test"}
        assert found["arm"].nunique() == 14 and set(found["layer"].dropna()) == {LAYER}
        assert found.loc[found["domain"] == "all", ["hallucination_rate", "wer_text"]].notna().all(axis=None)
        domains = tables["domains"]
        assert set(domains["domain"]) == {"music", "sounds", "talk"} and set(domains["level"]) == {"frame", "clip"}
        assert (
            domains[["share", "permuted", "left_out"]].apply(lambda values: values.dropna().between(0, 1).all()).all()
        )
    else:
        pairs = tables["stability"]
        assert set(pairs["kind"]) == {"seeds", "untrained"} and set(pairs["theta"]) == {0.3, 0.5}
        assert {(a[-1], b[-1]) for a, b in zip(pairs["a"], pairs["b"])} == {("0", "1"), ("1", "0")}
        trained = pairs[pairs["kind"] == "seeds"]
        assert (trained["coverage"] >= trained["null_shift"]).all() and trained["coverage"].max() > 0


RERUNS: dict[str, tuple[Callable[[Path, dict], object], set[str]]] = {
    "nothing": (lambda folder, config: None, set()),
    "another α": (lambda folder, config: config["hallucination"].update(alphas=[2]), {"hallucination", "tables"}),
    "lists the other way round": (lambda folder, config: config["hallucination"]["held_out"].reverse(), set()),
    "no hallucinations": (lambda folder, config: config.update(hallucination=None), {"tables"}),
    "library: edits": (
        lambda folder, config: append(folder, "edits.py", "EDITED = True\n"),
        {"hallucination", "tables"},
    ),
    "a comment there": (lambda folder, config: append(folder, "edits.py", "# x\n"), set()),
    "library: its tables": (lambda folder, config: append(folder, "tables.py", "EDITED = True\n"), {"tables"}),
    "library: its section": (lambda folder, config: append(folder, "section.py", "EDITED = True\n"), set()),
}


def append(folder: Path, name: str, text: str) -> None:
    path = folder / "src/eqknobs/stages/hallucination" / name
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize("edit", RERUNS)
def test_edits_rerun_what_hangs_on_them(run: Ran, edit: str) -> None:
    """Of the stage hallucination, which no other workflow test runs, on the way to its tables."""
    if run.kind != "whisper":
        pytest.skip("HuBERT does not transcribe")
    change, wanted = RERUNS[edit]
    config = yaml.safe_load((run.folder / "run.yaml").read_text())
    table = f"results/{config['run']['name']}/tables/sae.csv"
    before = {path: path.read_text() for path in (run.folder / "src/eqknobs/stages/hallucination").glob("*.py")}
    try:
        change(run.folder, config)
        (run.folder / "edited.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        said = snakemake(run.folder, table, "-n", "--nolock", "--configfile", "edited.yaml").stdout
    finally:
        for path, text in before.items():
            path.write_text(text)
    planned = set(re.findall(r"^(\w+) +\d+$", said, re.M)) - {"total"}
    assert planned == wanted


def test_the_slice_of_hallucination_is_what_its_script_takes(run: Ran) -> None:
    if run.kind == "whisper":
        assert misfits(recorded(run.folder)["hallucination"], taken("hallucination"), "hallucination") == []
