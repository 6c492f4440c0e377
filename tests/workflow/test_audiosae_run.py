"""config/audiosae-whisper.yaml and config/audiosae-hubert.yaml, shrunk, on tiny random models of the hub's format.

A job costs more than what it computes here, so each runs what the other does not: Whisper is spliced and has its
features told apart by domain and named after phones, HuBERT has two seeds compared. Searches and pages: test_rerun.py.
What edits of these stages invalidate is here too, as the small workflow has no Whisper.
"""

import os
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
        corpus |= {"max_utterances": 12} if corpus["source"] == "folder" else {}
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
        config["corpora"]["talk"]["phones"] = "resources/sounds/phones.csv"
        config["phones"] = default["phones"] | {"targets": ["*@heard"], "min_firings": 3, "shifts": 1, "epochs": 1}
    else:
        config["saes"]["one_scalar"] = config["saes"]["audiosae"] | {"input_scale": "scalar"}
        config["stability"] |= {"resamples": 20, "min_firings": 5, "shifts": 1}
    return config | dict.fromkeys(OFF[kind])


class Run(NamedTuple):
    """A finished shrunken configuration: of which kind of model, the folder, its main output, its tables."""

    kind: str
    folder: Path
    table: str
    tables: dict[str, pd.DataFrame]


def finished(kind: str, folder: Path) -> Run:
    copy_workflow(folder)
    write, model = WRITE[kind]
    torch.manual_seed(0)
    write(folder / "model")
    config = shrink(kind, model)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    tables = folder / "results" / config["run"]["name"] / "tables"
    table = f"{tables.relative_to(folder)}/sae.csv"
    snakemake(folder, table, "--cores", "1", "--configfile", "run.yaml")
    return Run(kind, folder, table, {path.stem: pd.read_csv(path) for path in tables.glob("*.csv")})


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("whisper", tmp_path_factory.mktemp("whisper") / "work")


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("hubert", tmp_path_factory.mktemp("hubert") / "work")


@pytest.mark.parametrize("name", sorted(WRITE))
def test_both_run_to_their_tables(name: str, request: pytest.FixtureRequest) -> None:
    kind, _, _, tables = request.getfixturevalue(name)
    sae = tables["sae"]
    assert set(sae["target"]) == {f"{WRITE[kind][1]}.layer.{LAYER}@heard"}
    assert set(sae["layer"]) == {LAYER} and set(sae["d_in"]) == {WIDTH} and set(sae["d_sae"]) == {FEATURES}
    assert sae.loc[sae["sae"] == "audiosae", "fvu"].between(0, 1).all() and sae["l0"].between(2, 8).all()
    heard = sae[sae["split"] == "test"][["wer_text_spliced", "nll_spliced", "no_speech_auc"]]
    assert (heard.notna() if kind == "whisper" else heard.isna()).all(axis=None)
    if kind == "whisper":
        spliced = tables["splicing"]
        assert set(spliced["arm"]) == {"unspliced", "mean", "sae", "untrained"}
        assert set(spliced["clips"]) == {2} and set(spliced["non_speech"]) == {2}
        domains = tables["domains"]
        assert set(domains["domain"]) == {"music", "sounds", "talk"} and set(domains["level"]) == {"frame", "clip"}
        assert (
            domains[["share", "permuted", "left_out"]].apply(lambda values: values.dropna().between(0, 1).all()).all()
        )
        phones = tables["phones"]
        assert set(phones["target"]) == set(sae["target"]) and set(phones["method"]) >= {
            "any_match",
            "top_feature",
            "probe",
        }
    else:
        scales = dict(zip(sae["sae"], sae["input_scale"]))
        assert scales == {"audiosae": "zscore", "one_scalar": "scalar"} and sae["fvu"].between(0, 2).all()
        pairs = tables["stability"]
        assert set(pairs["kind"]) == {"seeds", "untrained"} and set(pairs["theta"]) == {0.3, 0.5}
        assert {(a[-1], b[-1]) for a, b in zip(pairs["a"], pairs["b"])} == {("0", "1"), ("1", "0")}
        trained = pairs[pairs["kind"] == "seeds"]
        assert (trained["coverage"] >= trained["null_shift"]).all() and trained["coverage"].max() > 0


CODE = "\nEDITED = True\n"
TABLES = {"tables"}
OF_SAES = {"sae", "sae_scores", "splicing", "domains", "phones", "hallucination"}


def of(*keys: str, **values: object) -> Callable[[Path], None]:
    """Other values in a section of the configuration."""

    def edit(folder: Path) -> None:
        config = yaml.safe_load((folder / "run.yaml").read_text())
        section = config
        for key in keys:
            section = section[key]
        section.update(values)
        (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    return edit


def code(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "src/eqknobs/stages" / name
        path.write_text(path.read_text() + (CODE if path.suffix == ".py" else "<p>x</p>"))

    return edit


# A stage's edits, and the rules that run again up to the tables; what is drawn reruns the report alone.
EDITS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "nothing": (lambda folder: None, set()),
    "purity of phones": (of("phones", purity=0.4), {"phones"} | TABLES),
    "library: phones": (code("phones/compute.py"), {"phones"} | TABLES),
    "library: the table of phones": (code("phones/tables.py"), TABLES),
    "library: figures of phones": (code("phones/section.py"), set()),
    "the text on phones": (code("phones/section.html.j2"), set()),
    "no phones": (of(phones=None), TABLES),
    "where phones are from": (
        of("corpora", "talk", phones="./resources/sounds//phones.csv"),
        set(),
    ),
    "thresholds of domains": (of("domains", frame_taus=[0.3]), {"domains"} | TABLES),
    "library: domains": (code("domains/compute.py"), {"domains"} | TABLES),
    "library: figures of domains": (code("domains/section.py"), set()),
    "no domains": (of(domains=None), TABLES),
    "clips that are spliced": (of("splicing", clips=1), {"splicing"} | TABLES),
    "library: splicing": (code("saes/splicing.py"), {"splicing"} | TABLES),
    "no splicing": (of(splicing=None), TABLES),
    "another α of steering against hallucination": (of("hallucination", alphas=[2]), {"hallucination"} | TABLES),
    "sources held out, the other way round": (
        of("hallucination", held_out=["singularity-music", "minetest-data"]),
        set(),
    ),
    "no hallucinations": (of(hallucination=None), TABLES),
    "library: edits against hallucination": (code("hallucination/edits.py"), {"hallucination"} | TABLES),
    "library: the table of hallucinations": (code("hallucination/tables.py"), TABLES),
    "library: figures of hallucinations": (code("hallucination/section.py"), set()),
    "an SAE trained otherwise": (of("saes", "audiosae", epochs=2), OF_SAES | TABLES),
    "another seed": (of(sae_seeds=[0, 1]), OF_SAES | TABLES),
}


def planned(run: Run) -> set[str]:
    """The rules of the jobs that Snakemake would run now."""
    lines = snakemake(run.folder, run.table, "-n", "--nolock", "--configfile", "run.yaml").stdout.splitlines()
    jobs = (re.match(r"([a-z_]+) +\d+$", line) for line in lines)
    return {job[1] for job in jobs if job and job[1] != "total"}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_reruns_just_its_stages(name: str, whisper: Run) -> None:
    edit, expected = EDITS[name]
    folders = [
        whisper.folder / "src/eqknobs/stages" / stage for stage in ("phones", "domains", "saes", "hallucination")
    ]
    files = [whisper.folder / "run.yaml", *(path for folder in folders for path in folder.iterdir() if path.is_file())]
    kept = {path: (path.read_bytes(), path.stat()) for path in files}
    try:
        edit(whisper.folder)
        assert planned(whisper) == expected
    finally:
        for path, (data, stat) in kept.items():
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_slice_of_hallucination_is_what_its_script_takes(whisper: Run) -> None:
    assert misfits(recorded(whisper.folder)["hallucination"], taken("hallucination"), "hallucination") == []


def test_a_seed_that_goes_trains_nothing(hubert: Run) -> None:
    of(sae_seeds=[0])(hubert.folder)
    assert planned(hubert) == {"sae_scores", "stability"} | TABLES


def test_tiny_en_compares_scales_variants_and_sizes_at_one_layer() -> None:
    saes = yaml.safe_load((ROOT / "config/audiosae-tiny.en.yaml").read_text())["saes"]
    compared = {name: sae for name, sae in saes.items() if sae and name != "audiosae"}
    assert all(sae["targets"] == ["*.2"] and sae["corpus"] == "heard" for sae in compared.values())
    assert {sae["input_scale"] for sae in compared.values() if "input_scale" in sae} == {"raw", "unit_norm", "scalar"}
    assert {sae["variant"] for sae in compared.values()} == {"batchtopk", "topk", "jumprelu"}
    assert {sae["epochs"] for sae in compared.values()} == {4}
    width = 384  # of tiny.en
    assert compared["front"]["grid"] == {"k": [25, 50, 100], "d_sae": [8 * width, 32 * width]}
