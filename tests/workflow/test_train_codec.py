"""`config/train-tiny-mimi.yaml` documents how the bundled codec came about; here it runs, short, on another folder."""

import json
from pathlib import Path

import pandas as pd
import torch
import yaml
from transformers import MimiModel

from helpers import ROOT
from helpers.workflow import copy_workflow, snakemake

SHORT = {
    "model": {
        "hidden_size": 32,
        "num_filters": 4,
        "codebook_size": 16,
        "codebook_dim": 16,
        "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 16,
        "upsample_groups": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "data": {"resources/corpus/101": 0.75, "resources/corpus": 0.25},
    "batch": 4,
    "steps": 12,
    "finetune_steps": 6,
    "warmup": 3,
    "kmeans_frames": 300,
    "log_every": 6,
}


def write(folder: Path, name: str, changes: dict) -> str:
    """A shortened copy of the bundled codec's training configuration; returns its path below the folder."""
    config = yaml.safe_load((ROOT / "config/train-tiny-mimi.yaml").read_text())
    training = config["codec_training"]
    training["model"] |= changes.pop("model", {})
    training |= changes
    config["run"]["name"] = name
    (folder / f"config/{name}.yaml").write_text(yaml.safe_dump(config))
    return f"config/{name}.yaml"


def test_a_codec_is_trained_from_any_folder_of_speech_and_trained_on(tmp_path):
    folder = copy_workflow(tmp_path / "work")
    short = write(folder, "short", SHORT | {"model": dict(SHORT["model"])})
    snakemake(folder, "--cores", "1", "--configfile", short)
    codec = folder / "results/short/model"
    log = pd.read_csv(codec / "log.csv")
    assert log["step"].tolist() == [6, 12, 18] and log["phase"].tolist() == ["codec", "codec", "quantiser"]
    assert log["unquantised"].iloc[1] < log["unquantised"].iloc[0]
    assert pd.notna(log["quantised"].iloc[2])
    facts = json.loads((codec / "training.json").read_text())
    assert facts["steps_done"] == 18 and facts["clips"] == len(list((ROOT / "resources/corpus").rglob("*.flac")))

    again = write(folder, "again", {**SHORT, "model": dict(SHORT["model"]), "steps": 0, "start": "results/short/model"})
    snakemake(folder, "--cores", "1", "--configfile", again)
    first, second = (MimiModel.from_pretrained(folder / f"results/{n}/model").state_dict() for n in ("short", "again"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert json.loads((folder / "results/again/model/training.json").read_text())["before"] == facts
    assert "Nothing to be done" in snakemake(folder, "--cores", "1", "--configfile", again).stderr
