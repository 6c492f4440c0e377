import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.resources import Resource

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from eqknobs.config import decodes, describe, parse_target, settle, stage_config
from eqknobs.errors import EqknobsError
from eqknobs.models.access import require_access
from eqknobs.models.moshi.memory import check as check_memory
from eqknobs.provenance import code_inputs
from eqknobs.strict_yaml import read_yaml

try:
    for file in workflow.configfiles:  # Snakemake's own reader takes the last of two equal keys
        read_yaml(file)
    settle(config, workflow.config_settings.config)
    if workflow.is_main_process:
        logger.info(describe(config))
        check_memory(config)
except EqknobsError as error:
    raise WorkflowError(str(error)) from None

RUN = f"results/{config['run']['name']}"
TARGETS = config["run"]["targets"]
CODEC_TARGETS = [target for target in TARGETS if decodes(config, target)]
PROPERTIES = config["probes"]["properties"]
SAES = sorted(config["saes"] or {})  # null: caches, labels and probes only
SEEDS = sorted(config["sae_seeds"])
GRIDS = [name for name in SAES if "grid" in config["saes"][name]]
SOUND_STAGES = ["codec", "steering", "importance"]
ENV = "../envs/eqknobs.yaml"

# One GPU, one job on it, also when the user forgets `--resources gpu=1`.
if workflow.is_main_process and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", Resource("gpu", 1))


wildcard_constraints:
    target=r"[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z_]+(\.[0-9]+)?",
    property="centroid|rms|pitch",
    sae="[A-Za-z0-9][A-Za-z0-9_-]*",
    seed="[0-9]+",
    stage="codec|steering|importance",


def cfg(stage):
    """The one parameter of a rule: its slice of the configuration."""
    return lambda wildcards: stage_config(config, stage, **dict(wildcards))


def code(script):
    """A script and every module of the package it imports, as inputs: editing one reruns just its stages."""
    return code_inputs(Path(workflow.basedir) / "workflow" / "scripts" / script)


def gpu(wildcards):
    """1 where the job may use a GPU: CPU-only configurations run side by side."""
    return 0 if config["hardware"]["device"] == "cpu" else 1


def model_files(wildcards):
    """Configuration and weights of a model in a local folder, and of its codec: other weights, other activations."""
    model = config["models"][parse_target(wildcards.target)[0]]
    folders = [Path(model[key]) for key in ("path", "codec") if key in model]
    return [
        str(file)
        for folder in folders
        if folder.is_dir()
        for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    ]


def training_records(wildcards):
    """Which voices a bundled model heard in its own training."""
    records = [
        Path(config["models"][parse_target(t)[0]]["path"]) / "training.json"
        for t in TARGETS
    ]
    return sorted({str(record) for record in records if record.is_file()})


def label_files(wildcards):
    """The labels CSV, where one is configured."""
    path = config["data"]["labels"]
    return [path] if path and Path(path).is_file() else []
