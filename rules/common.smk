import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.resources import Resource

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from eqknobs.config import (
    decodes,
    describe,
    parse_target,
    reference_saes,
    settle,
    stage_config,
)
from eqknobs.corpus.properties import PROPERTIES as REGISTERED
from eqknobs.errors import EqknobsError
from eqknobs.models.access import require_access
from eqknobs.models.moshi.memory import check as check_memory
from eqknobs.models import KINDS
from eqknobs.provenance import DIGESTS, code_inputs, corpus_files, module_inputs
from eqknobs.strict_yaml import read_yaml

try:
    # Snakemake's own reader takes the last of two equal keys without a word.
    for file in workflow.configfiles:
        read_yaml(file)
    settle(config, workflow.config_settings.config)
    if workflow.is_main_process:
        logger.info(describe(config, corpus_files))
        check_memory(config)
except EqknobsError as error:
    raise WorkflowError(str(error)) from None

RUN = f"results/{config['run']['name']}"
TARGETS = config["run"]["targets"]
CODEC_TARGETS = [target for target in TARGETS if decodes(config, target)]
PROPERTIES = config["probes"]["properties"]
SAES = sorted(config["saes"] or {})  # null: caches, labels and probes only
SEEDS = sorted(config["sae_seeds"])
SAE_FILES = ["config.json", "sae.safetensors"]


def first_saes(names):
    """Of these SAEs of a target, the first seed's files."""
    return expand(
        f"{RUN}/saes/{{{{target}}}}/{{sae}}/seed{SEEDS[0]}/{{file}}",
        sae=names,
        file=SAE_FILES,
    )


def probe_files(properties, saes):
    """The probes of a target on the base spaces and on the codes of these SAEs."""
    return [
        *expand(f"{RUN}/probes/{{{{target}}}}/{{property}}.npz", property=properties),
        *expand(
            f"{RUN}/probes/{{{{target}}}}/{{sae}}/{{property}}.npz",
            sae=saes,
            property=properties,
        ),
    ]


GRIDS = [name for name in SAES if "grid" in config["saes"][name]]
SOUND_STAGES = ["codec", "steering", "importance"]
ENV = "../envs/eqknobs.yaml"

# One GPU, one job on it, also when the user forgets `--resources gpu=1`.
if workflow.is_main_process and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", Resource("gpu", 1))


wildcard_constraints:
    target=r"[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z_]+(\.[0-9]+)?",
    property="|".join(REGISTERED),
    sae="[A-Za-z0-9][A-Za-z0-9_-]*",
    seed="[0-9]+",
    stage="codec|steering|importance",


def script_of(stage):
    return Path(workflow.basedir) / "workflow" / "scripts" / f"{stage}.py"


def cfg(stage, **outside):
    """The one parameter of a rule: its slice of the configuration, and digests of what it reads from outside results/.

    `outside` names functions of the wildcards that list files, or tell a digest themselves; the code of the stage is
    always among the digests.
    """

    def parameter(wildcards):
        content = {"code": code_inputs(script_of(stage))}
        content |= {name: found(wildcards) for name, found in outside.items()}
        for name, files in content.items():
            content[name] = files if isinstance(files, str) else DIGESTS.of(files)
        slice = stage_config(config, stage, **dict(wildcards))
        return {**slice, "content": dict(sorted(content.items()))}

    return parameter


def really_runs():
    """Not a dry run, nor --summary, --dag and their like."""
    return workflow.executor_plugin is not None and not workflow.dryrun


def page_sounds(wildcards):
    return DIGESTS.of_sounds(f"{RUN}/report/index.html", really_runs())


def sounds_of(stage):
    """A mark of a stage's renders, which are made again when some of them are gone."""
    index = f"{RUN}/renders/{{}}/{stage}/index.csv"
    return lambda wildcards: DIGESTS.of_sounds(
        index.format(wildcards.target), really_runs()
    )


def code(script):
    """A script and every module of the package it imports, as inputs; their contents are in the rule's parameter."""
    return ancient(code_inputs(script_of(Path(script).stem)))


def gpu(wildcards):
    """1 where the job may use a GPU: CPU-only configurations run side by side."""
    return 0 if config["hardware"]["device"] == "cpu" else 1


def model_files(wildcards):
    """The code of a model's kind, and what is read of it in a local folder, and of its codec: other weights, other
    activations."""
    model = config["models"][parse_target(wildcards.target)[0]]
    folders = [Path(model[key]) for key in ("path", "codec") if key in model]
    weights = [
        str(file)
        for folder in folders
        for file in sorted(folder.glob("*"))
        if file.suffix in (".safetensors", ".model")
        or file.name in ("config.json", "preprocessor_config.json")
        or file.name.endswith(".index.json")
    ]
    return ancient([*weights, *module_inputs(KINDS[model["kind"]].split(":")[0])])


def training_records(wildcards):
    """Which voices a bundled model heard in its own training."""
    records = [
        Path(config["models"][parse_target(t)[0]]["path"]) / "training.json"
        for t in TARGETS
    ]
    return ancient(sorted({str(record) for record in records if record.is_file()}))


def asr_files(wildcards):
    """The speech recogniser, where it is a folder."""
    folder = Path(config["judges"]["asr"])
    return ancient(sorted(str(file) for file in folder.glob("*") if file.is_file()))


def label_files(wildcards):
    """The labels CSV, where one is configured."""
    path = config["data"]["labels"]
    return ancient([path] if path and Path(path).is_file() else [])


def speech_files(wildcards):
    """The speech on this disk; that of LibriSpeech is known by its published checksum."""
    source, path = config["data"]["source"], config["data"]["path"]
    if source == "librispeech":
        return []
    return corpus_files(path) if source == "folder" else [path]


def speech_lm_files(wildcards):
    """The clips that a speech LM learns from, with their word times, its codec, and the model that it starts as."""
    training = config["speech_lm_training"]
    folders = [training[key] for key in ("codec", "start") if key in training]
    clips = sorted(Path(training["speech"]).glob("*/*.*"))
    return [*(file for folder in folders for file in Path(folder).glob("*")), *clips]


def training_files(wildcards):
    """The speech that the codec learns from, and the codec that it starts as."""
    training = config["codec_training"]
    start = Path(training["start"]).glob("*") if "start" in training else []
    return [
        *start,
        *(file for folder in training["data"] for file in corpus_files(folder)),
    ]
