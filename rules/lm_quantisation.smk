from eqknobs.stages.lm_quantisation.checks import guided

PACKED_LMS = config["lm_quantisation"]["models"]
SECTIONS["lm_quantisation"] = {"targets": PACKED_LMS}
TABLES += ["lm_quantisation", "lm_quantisable"]
TABLE_INPUTS += expand(
    f"{RUN}/scores/{{model}}.{{name}}.csv",
    model=PACKED_LMS,
    name=[
        "lm_quantisation.sensitivity",
        "lm_quantised_nats",
        "lm_quantised_answers",
    ],
)
REPORT_INPUTS += expand(
    f"{RUN}/renders/{{model}}/quantised/index.csv", model=PACKED_LMS
)


rule lm_quantisation:
    input:
        model=lambda wildcards: files_of(wildcards.model),
        probes=(
            [
                f"{RUN}/scores/{{model}}.lm_layers.csv",
                f"{RUN}/scores/{{model}}.lm_heads.csv",
            ]
            if guided(config["lm_quantisation"])
            else []
        ),
        manifest=talk_manifest("lm_quantisation"),
        asr=asr_files,
        script=code("lm_quantisation.py"),
    output:
        sensitivity=f"{RUN}/scores/{{model}}.lm_quantisation.sensitivity.csv",
        nats=f"{RUN}/scores/{{model}}.lm_quantised_nats.csv",
        answers=f"{RUN}/scores/{{model}}.lm_quantised_answers.csv",
        index=f"{RUN}/lm_quantisation/{{model}}/index.csv",
        sounds=f"{RUN}/renders/{{model}}/quantised/index.csv",
    log:
        f"{RUN}/logs/lm_quantisation.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_quantisation.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_quantisation",
            lambda wildcards: {
                **but(config["lm_quantisation"], "models"),
                "model": but(model_config(config, wildcards.model), "stream"),
                "judges": config["judges"],
                "seed": SEED,
            },
            model=lambda wildcards: files_of(wildcards.model),
            speech=lambda wildcards: told_files("lm_quantisation"),
            asr=asr_files,
        ),
    message:
        "Pack {wildcards.model} in many ways and judge what it says"
    script:
        "../workflow/scripts/lm_quantisation.py"
