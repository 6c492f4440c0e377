"""`config/train-tiny-moshi.yaml` documents how the bundled speech LM came about; here it runs, short, on tones."""

import json
from pathlib import Path

import pandas as pd
import yaml

from eqknobs.models.moshi.adapter import Moshi
from helpers import ROOT
from helpers.speech_lm_world import PARTS, SIZES, write_speech
from helpers.workflow import copy_workflow, snakemake

SHORT = {
    "batch": 4,
    "copy_steps": 4,
    "steps": 6,
    "warmup": 2,
    "log_every": 5,
    "validation": 2,
    "speech": "speech",
    "synthesis": None,
    "start": None,
}
SCORES = {
    "answers": 3,
    "zeroed_answers": 2,
    "batch": 2,
    "conditions": ["intact", "sampled", "forced", "heads_zeroed_.5"],
    "seeds": 2,
}


def write(folder: Path, name: str, **changes: object) -> str:
    """A shortened copy of the bundled model's training configuration; returns its path below the folder."""
    config = yaml.safe_load((ROOT / "config/train-tiny-moshi.yaml").read_text())
    training = config["speech_lm_training"]
    training |= SHORT | changes | {"model": SIZES, "scores": training["scores"] | SCORES}
    config["run"]["name"] = name
    (folder / f"config/{name}.yaml").write_text(yaml.safe_dump(config))
    return f"config/{name}.yaml"


def test_a_speech_lm_is_trained_scored_and_trained_on(tmp_path):
    folder = copy_workflow(tmp_path / "work")
    write_speech(folder / "speech")
    snakemake(folder, "--cores", "1", "--configfile", write(folder, "short"))
    out = folder / "results/short/speech_lm"
    log = pd.read_csv(out / "log.csv")
    assert log["step"].tolist() == [4, 5, 10] and log["clips"].unique().tolist() == [PARTS["train"]]
    assert log["codebook_1"].iloc[2] < log["codebook_1"].iloc[0] and log["text"].iloc[2] < log["text"].iloc[0]
    facts = json.loads((out / "training.json").read_text())
    assert facts["steps_done"] == 10 and facts["config"]["seed"] == 0

    table = pd.read_csv(folder / "results/short/tables/speech_lm.csv").set_index("condition")
    assert table["answers"].to_dict() == {"intact": 3, "sampled": 6, "forced": 3, "heads_zeroed_.5": 4}
    assert (table["wer_prompt"] >= 0).all() and table.loc["forced", "wer_prompt"] == 0 and table["speakers"].eq(2).all()
    model = Moshi({"name": "short", "path": str(out), "device": "cpu"})  # its config.json names its codec
    assert model.config.card == 512 and max(model.config.silence) < 512 and model.sample_rate == 16000

    again = write(folder, "again", copy_steps=0, steps=2, start="results/short/speech_lm")
    snakemake(folder, "--cores", "1", "--configfile", again)
    assert json.loads((folder / "results/again/speech_lm/training.json").read_text())["before"] == facts
    assert "Nothing to be done" in snakemake(folder, "--cores", "1", "--configfile", again).stderr
