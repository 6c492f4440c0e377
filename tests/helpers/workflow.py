"""A small configuration, and the workflow in a folder of its own."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from eqknobs.config import merge
from helpers import ROOT
from helpers.planning import planned

PARTS = ["Snakefile", "rules", "workflow", "src", "config", "profiles", "envs", "docs", "tools"]

# Small in every count, whole in kind: every stage and rule of the demo runs, on two targets' worth of speech.
SMALL = {
    "run": {"name": "small", "seed": 0, "targets": ["tiny-mimi.encoder_transformer"]},
    "data": {"max_utterances": 48, "max_minutes": 4},
    "saes": {
        "rms_l1": {"d_sae": 320, "epochs": 2, "batch_size": 256},
        "topk": {"d_sae": 320, "k": 16, "aux_k": 32, "epochs": 2, "batch_size": 256, "grid": {"k": [8, 16]}},
    },
    "probes": {"bins": 8, "epochs": 3, "lags": [0, 1]},
    "erasing": {
        "tasks": {"heard": None, "speech": ["sex", "voice"]},
        "targets": ["*"],
        "kept": [1, 8],
        "removed": [0.5],
        "random": {"seeds": 2, "kept": [8], "removed": []},
        "shuffles": 1,
        "swaps": [1, 8],
        "sources": 1,
    },
    "features": {"count": 3, "random": 2, "clips": 2, "map_clips": 3, "map_frames": 5, "saes": ["topk"]},
    "codec": {"clips": 2, "codebooks": [16]},
    "steering": {
        "clips": 2,
        "val_clips": 2,
        "high_bin": 7,
        "alphas": [0, 2],
        "listen": 1,
        "clamp_features": [4],
    },
    "importance": {
        "maps": ["composition", "composition_scaled", "raw_probe", "variance", "inverted", "fisher", "ablation"],
        "clips": 2,
        "gradient_clips": 1,
        "oracle_clips": 1,
        "segment_seconds": 0.1,
        "val_clips": 1,
        "removed": [0.5],
        "random_sets": 2,
        "word_random_sets": 1,
    },
    "quantisation": {
        "parts": ["codec"],
        "widths": [2, 4, 8],
        "budgets": [3],
        "roundings": ["nearest"],
        "random_plans": 1,
        "sensitivity_clips": 1,
        "segment_seconds": 0.1,
        "clips": 2,
        "heard_clips": 1,
        "heard_widths": [4],
    },
    "accent": {
        "synthesis": {"variants": ["m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4"], "count": 5},
        "codecs": {"tiny-mimi": {"codebooks": [4, 16], "grid": 16}},
        "ratios": [2],
        "sparsities": [0.05],
        "equal_k": [7],
        "frames": 200,
        "sae": {"epochs": 2, "tuned_lr": [0.01]},
        "classifier": {"tuned_c": [1], "max_iter": 300},
    },
    "speech_lm": {"answers": 2, "zeroed_answers": 2, "batch": 2, "conditions": ["intact", "heads_zeroed_.5"]},
    "corpora": {"sentences": {"max_utterances": 40}},
    "lm_layers": {
        "properties": ["centroid", "token", "who"],
        "bins": 8,
        "lags": [0, 2],
        "sae": {"layers": [3], "d_sae": 64, "k": 8, "aux_k": 16, "epochs": 2},
        "epochs": 2,
    },
    "lm_pruning": {
        "prompts": {"count": 2, "held_out": 2, "calibration": 2},
        "heads": {"orders": ["acoustic_first", "random", "gradient"], "shares": [0.5], "seeds": 1, "repairs": ["zero"]},
        "weights": {"orders": ["guided"], "shares": [0.375]},
        "layers": {"orders": ["damage"], "shares": [0.34]},
        "answered": ["heads:acoustic_first:*", "heads:random:*"],
        "removal": None,  # test_moshi_run.py takes heads out
        "codebooks": {"readings": ["d"], "counts": [4], "count": 1},
        "batch": 2,
        "listen": 1,
    },
    "lm_quantisation": {
        "prompts": {"count": 2, "held_out": 2, "calibration": 2},
        "widths": [2, 3, 4],
        "budgets": [3],
        "random_plans": 1,
        "nf4": False,
        "answered": ["temporal:uniform:3:0", "temporal:layer:3:0", "temporal:inverted:3:0"],
        "batch": 2,
    },
    "lm_recipe": None,  # half a minute; test_lm_recipe.py makes one of an untrained model
    "lm_steering": {
        "prompts": {"val": 1, "test": 2},
        "layers": [3],
        "shifts": {"rms": 3, "voice": None},
        "directions": ["difference_in_means", "sae_feature"],
        "alphas": [0.5],
        "rounds": 0,
        "random": {"seeds": 1, "beside": ["difference_in_means"]},
        "batch": 2,
        "listen": 1,
    },
    "tables": {"bootstrap": 100},
    "report": {"clips": 1},
}


def snakemake(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run Snakemake in a folder, offline, with the package of that folder."""
    env = {
        **os.environ,
        "PYTHONPATH": str(folder / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if {"--summary", "-n", "--dry-run"} & {*arguments}:
        done = planned(folder, arguments, env)
    else:
        command = [sys.executable, "-m", "snakemake", *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"snakemake {arguments} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def copy_workflow(folder: Path) -> Path:
    """A copy of the workflow with links to the bundled resources."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, folder / part)
    (folder / "resources").symlink_to(ROOT / "resources")
    return folder


def write_config(folder: Path, change: Callable[[dict], object] | None = None) -> None:
    """Write the small configuration as the folder's default, after `change` edited it."""
    config = merge(yaml.safe_load((ROOT / "config/config.yaml").read_text()), copy.deepcopy(SMALL))
    config["saes"] = {name: config["saes"][name] for name in SMALL["saes"]}
    if change:
        change(config)
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
