from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/activations.smk"
include: "rules/saes.smk"
include: "rules/probes.smk"
include: "rules/renders.smk"
include: "rules/judges.smk"
include: "rules/report.smk"
include: "rules/codec_training.smk"
include: "rules/speech_lm_training.smk"


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
        (
            TRAINED
            if "codec_training" in config
            else (
                SPOKEN
                if "speech_lm_training" in config
                else f"{RUN}/report/index.html"
            )
        ),


# Milestones: `snakemake caches --cores 2` stops after the activation caches and their labels, and so on.
rule manifests:
    input:
        f"{RUN}/manifest/manifest.csv",


rule caches:
    input:
        expand(f"{RUN}/labels/{{target}}.h5", target=TARGETS),


rule dictionaries:
    input:
        expand(f"{RUN}/saes/{{target}}/saes.json", target=TARGETS if SAES else []),


rule probings:
    input:
        expand(probe_files(PROPERTIES, SAES), target=TARGETS),


rule sounds:
    input:
        expand(
            f"{RUN}/renders/{{target}}/{{stage}}/index.csv",
            target=CODEC_TARGETS,
            stage=SOUND_STAGES,
        ),
