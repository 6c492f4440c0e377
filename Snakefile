from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/models.smk"
include: "rules/activations.smk"


# The stages, in the order of the report; one that is null in the configuration is not there at all.
STAGES = [
    "saes",
    "stability",
    "domains",
    "probes",
    "phones",
    "label_search",
    "erasing",
    "features",
    "hallucination",
    "codec",
    "steering",
    "importance",
    "quantisation",
    "accent",
    "speech_lm",
    "lm_layers",
    "lm_pruning",
    "lm_quantisation",
    "lm_recipe",
    "lm_steering",
]
for stage in STAGES:
    if config[stage]:

        include: f"rules/{stage}.smk"


include: "rules/judges.smk"
include: "rules/report.smk"


if "codec_training" in config:

    include: "rules/codec_training.smk"


if "speech_lm_training" in config:

    include: "rules/speech_lm_training.smk"


# What the stages that are on work on (targets; of speech LMs that speak, models), and the corpora that they hear.
WORKED_ON = list(
    dict.fromkeys(
        [*TARGETS, *(t for stage in SECTIONS.values() for t in stage["targets"])]
    )
)
CORPORA = corpora_used(config, WORKED_ON + LISTENING)
config["worked_on"] = WORKED_ON  # for jobs that serve several; no part of any slice


localrules:
    all,
    manifests,
    caches,
    dictionaries,
    probings,
    sounds,


rule all:
    default_target: True
    input:
        FINAL,


# Milestones: `snakemake caches --cores 2` stops after the activation caches and their labels, and so on.
rule manifests:
    input:
        [manifest_file(corpus) for corpus in CORPORA],


rule caches:
    input:
        expand(
            f"{RUN}/labels/{{target}}.h5",
            target=[target for target in WORKED_ON if parse_target(target)[1]],
        ),


rule dictionaries:
    input:
        SAE_SCORES,


rule probings:
    input:
        PROBES,


rule sounds:
    input:
        [
            f"{RUN}/renders/{target}/{sound}/index.csv"
            for sound, targets in SOUNDS.items()
            for target in targets
        ],
