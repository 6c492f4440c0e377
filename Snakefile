from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/activations.smk"


# The stages, in the order of the report; one that is null in the configuration is not there at all.
if config["saes"]:

    include: "rules/saes.smk"


if config["probes"]:

    include: "rules/probes.smk"


if config["codec"]:

    include: "rules/codec.smk"


if config["steering"]:

    include: "rules/steering.smk"


if config["importance"]:

    include: "rules/importance.smk"


if config["speech_lm"]:

    include: "rules/speech_lm.smk"


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
CORPORA = corpora_used(config, WORKED_ON)


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
