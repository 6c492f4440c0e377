"""config/moshiko.yaml and config/personaplex.yaml, shrunk, on tiny random checkpoints of the hub's format."""

import copy
import math
import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from eqknobs.config import merge
from helpers import ROOT
from helpers.moshi_world import KYUTAI, PERSONA, write_codec, write_kyutai, write_persona
from helpers.workflow import SMALL, copy_workflow, snakemake

# What both configurations say alike is run for one of them.
ONCE = ("lm_quantisation", "lm_steering")
WRITE = {"moshiko": (write_kyutai, KYUTAI), "personaplex": (write_persona, PERSONA)}


def shrink(name: str, folder: Path) -> dict:
    """The shipped configuration with tiny files in place of the hub's, bundled speech, and layers that exist."""
    config = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
    model = config["models"][name]
    model |= {"path": f"{folder}/model", "codec": f"{folder}/codec", "revision": None, "codec_revision": None}
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["data"] = default["data"] | {"max_utterances": 12, "max_minutes": 1, "max_seconds": 8.0}
    config["labels"] = {"crepe": "tiny"}
    config["hardware"]["threads"] = 1
    for key in ("probes", "tables"):
        config[key] = copy.deepcopy(SMALL[key])
    config["probes"]["properties"] = ["centroid", "rms"]
    readers = {"max_utterances": 24, "split_unit": "sentence", "max_minutes": 2}
    config["corpora"] = {"readers": config["data"] | readers}
    small = copy.deepcopy(SMALL["lm_layers"]) | {"properties": ["centroid", "token", "who"], "frames": 4000}
    config["lm_layers"] |= small | {"tokens": 8, "sae": small["sae"] | {"layers": [1]}}
    pruning = copy.deepcopy(SMALL["lm_pruning"]) | {"removal": {"shares": [0.5], "nf4": False}}
    pruning["prompts"] = config["lm_pruning"]["prompts"] | pruning["prompts"] | {"seconds": 1.6}
    config["lm_pruning"] |= pruning | {"draws": 1, "confirmed": [], "dnsmos": False}
    packing = copy.deepcopy(SMALL["lm_quantisation"])
    packing["prompts"] = config["lm_quantisation"]["prompts"] | packing["prompts"] | {"seconds": 1.6}
    config["lm_quantisation"] |= packing | {"draws": 1, "best": {"count": 0, "budget": 3}, "dnsmos": False}
    steering = copy.deepcopy(SMALL["lm_steering"]) | {"layers": [1], "shifts": {"pitch": 2, "rms": -3, "voice": None}}
    steering["prompts"] = config["lm_steering"]["prompts"] | steering["prompts"] | {"seconds": 1.6}
    config["lm_steering"] |= steering
    if name != "moshiko":
        config.update(dict.fromkeys(ONCE))
    config["steering"] = {"high_bin": SMALL["probes"]["bins"] - 1}
    # the same kinds of sites, at the layers that a model of three has
    kinds = sorted({target.split(".")[1] for target in config["run"]["targets"]}, reverse=True)
    config["run"]["targets"] = [f"{name}.{kind}.{layer}" for kind, layer in zip(kinds, (2, 1))]
    return config


@pytest.fixture(scope="module", params=sorted(WRITE))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """A folder in which a shrunken configuration has run to its report, its configuration and its name."""
    name = request.param
    folder = copy_workflow(tmp_path_factory.mktemp(name) / "work")
    WRITE[name][0](folder / "model")
    write_codec(folder / "codec")
    config = shrink(name, folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    snakemake(folder, "--cores", "2", "--configfile", "run.yaml")
    return folder, merge(yaml.safe_load((ROOT / "config/config.yaml").read_text()), config), name


def test_caches_hold_a_frame_for_every_80_ms(run: tuple[Path, dict, str]) -> None:
    folder, config, name = run
    manifest = pd.read_csv(folder / f"results/{name}/manifest/manifest.csv")
    assert len(config["run"]["targets"]) == 2
    for target in config["run"]["targets"]:
        kind, layer = target.split(".")[1:]
        with h5py.File(folder / f"results/{name}/activations/{target}.h5") as file:
            frames = file["utterances/frames"][:]
            assert frames.tolist() == [math.ceil(n / 1920) for n in file["utterances/samples"][:]]
            assert np.allclose(frames * 0.08, manifest["seconds"], atol=0.081)
            acts = file["activations"][:]
            assert acts.shape == (frames.sum(), WRITE[name][1].dim)
            assert np.isfinite(acts).all() and (acts.std(0) > 0).all()
            assert (file.attrs["frame_rate"], file.attrs["hop"], file.attrs["sample_rate"]) == (12.5, 1920, 24000)
            path = f"transformer.layers.{layer}" + (".self_attn.out_proj" if kind == "heads" else "")
            assert file.attrs["module_path"] == path
        with h5py.File(folder / f"results/{name}/labels/{target}.h5") as file:
            assert len(file["logmel"]) == len(acts)


def test_probes_ran_on_activations_and_on_log_mel(run: tuple[Path, dict, str]) -> None:
    folder, config, name = run
    table = pd.read_csv(folder / f"results/{name}/tables/probes.csv")
    assert set(table["target"]) == set(config["run"]["targets"])
    assert set(table["space"]) == {"raw", "pca_d", "logmel"}
    assert set(table["property"]) == {"centroid", "rms"}
    assert table[["accuracy", "majority", "shuffled", "ridge_r2"]].notna().all().all()
    loud = table.query("property == 'rms' and binning == 'quantile' and split == 'test'").set_index(["target", "space"])
    for target in config["run"]["targets"]:  # the spectrum tells how loud a frame is; chance does not
        assert loud.loc[(target, "logmel"), "accuracy"] > 1.5 * loud.loc[(target, "logmel"), "shuffled"]
    for other in ("codec", "steering", "importance_ablation", "quantisation"):
        assert pd.read_csv(folder / f"results/{name}/tables/{other}.csv").empty
    assert not (folder / f"results/{name}/tables/sae.csv").exists()  # switched off


def test_the_report_shows_probes_and_nothing_that_was_not_run(run: tuple[Path, dict, str]) -> None:
    folder, config, name = run
    pages = (folder / f"results/{name}/report").glob("*.html")
    page = "".join(path.read_text() for path in pages)
    for target in config["run"]["targets"]:
        assert target in page
    assert "Spectral centroid: the probe on raw latents names the right class in" in page
    for absent in ("Dictionaries", "The codec alone", "Steering the centroid", "Importance map"):
        assert absent not in page, absent
    assert not (folder / f"results/{name}/saes").exists()
    assert {path.name for path in (folder / f"results/{name}/renders").glob("*/*")} == {
        "pruned",
        *(("quantised", "steered") if name == "moshiko" else ()),
    }


def test_what_people_are_answered_is_judged_after_pruning(run: tuple[Path, dict, str]) -> None:
    folder, _, name = run
    answers = pd.read_csv(folder / f"results/{name}/scores/{name}.lm_pruned_answers.csv")
    assert set(answers["granularity"]) == {"intact", "heads"} and (answers["seconds"] == 1.6).all()
    assert answers["words_prompt"].isna().all() and answers["nll_intact"].gt(0).all()  # nobody told it what to say
    nats = pd.read_csv(folder / f"results/{name}/scores/{name}.lm_nats.csv")
    assert set(nats["granularity"]) == {"intact", "heads", "weights", "layers"} and nats["nll_audio"].gt(0).all()
    removal = pd.read_csv(folder / f"results/{name}/tables/lm_removal.csv").set_index("share")
    assert set(removal["format"]) == {"nf4"} and removal.loc[0.5, "bytes"] < removal.loc[0.0, "bytes"]
    codebooks = pd.read_csv(folder / f"results/{name}/tables/lm_codebooks.csv")
    assert codebooks["step_ratio"].gt(0).all() and codebooks["codebooks"].eq(4).all()
    assert "Heads taken out" in (folder / f"results/{name}/report/lm_pruning.html").read_text()


def test_every_layer_and_head_is_probed_in_both_streams(run: tuple[Path, dict, str]) -> None:
    folder, _, name = run
    sizes = WRITE[name][1]
    layers = pd.read_csv(folder / f"results/{name}/tables/lm_layers.csv")
    assert set(layers["layer"]) == set(range(sizes.layers)) and set(layers["stream"]) == {"user", "agent", "both"}
    measured = ["accuracy", "majority", "shuffled", "logmel", "embeddings", "random_network"]
    assert layers[measured].notna().all().all()
    heads = pd.read_csv(folder / f"results/{name}/tables/lm_heads.csv")
    assert len(heads) == sizes.layers * sizes.heads * 2 * 2 * 2  # streams, properties, splits
    order = pd.read_csv(folder / f"results/{name}/scores/{name}.lm_heads.csv")
    assert list(order) == "layer head property accuracy selectivity half_a half_b".split()
    assert "<title>layer 2, head 1: " in (folder / f"results/{name}/report/lm_layers.html").read_text()


@pytest.mark.parametrize("run", ["moshiko"], indirect=True)
def test_what_people_are_answered_is_steered(run: tuple[Path, dict, str]) -> None:
    folder, _, name = run
    rows = pd.read_csv(folder / f"results/{name}/tables/lm_steering.csv")
    test = rows[rows["split"] == "test"]
    assert set(test["direction"]) >= {"intact", "difference_in_means", "sae_feature", "random", "vocoder", "gain"}
    assert test["wer_prompt"].isna().all() and (test["prompts"] == 2).all()
    assert test[test["direction"] == "gain"]["level_shift"].item() == pytest.approx(-3, abs=1e-3)
    assert "Listen: intact and steered" in (folder / f"results/{name}/report/lm_steering.html").read_text()


def planned(folder: Path, config: str) -> set[str]:
    """Names of the rules that would run, from the dry run's job table."""
    done = snakemake(folder, "-n", "--configfile", config)
    return set(re.findall(r"^(\w+) +[0-9]+$", done.stdout + done.stderr, re.M)) - {"all", "total"}


def test_a_second_run_does_nothing_and_an_edit_reruns_what_depends_on_it(run: tuple[Path, dict, str]) -> None:
    folder, _, name = run
    assert planned(folder, "run.yaml") == set()
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["hardware"]["vram_gb"] = 24
    (folder / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(folder, "changed.yaml") == set()  # another machine, the same results
    config["models"][name]["stream"] = "agent"
    (folder / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(folder, "changed.yaml") == {"activations", "labels", "probes", "tables", "report"}


def test_it_refuses_before_work_what_does_not_fit(run: tuple[Path, dict, str]) -> None:
    folder, _, name = run
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["hardware"] |= {"device": "cuda", "vram_gb": 0.5}
    config["run"]["name"] = "never"
    (folder / "large.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(folder, "--cores", "1", "--configfile", "large.yaml", check=False)
    assert done.returncode and "do not fit hardware.vram_gb = 0.5" in done.stderr and "Traceback" not in done.stderr
    config["hardware"]["device"] = "cpu"
    config["run"]["targets"] = [f"{name}.residual.3"]
    (folder / "deep.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(folder, "--cores", "1", "--configfile", "deep.yaml", check=False)
    assert done.returncode and "the model has layers 0 to 2" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "results/never").exists()
