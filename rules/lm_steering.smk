from eqknobs.stages.lm_steering.checks import needs_saes

STEERED_LMS = config["lm_steering"]["models"]
SECTIONS["lm_steering"] = {"targets": STEERED_LMS}
TABLES += ["lm_steering"]
TABLE_INPUTS += expand(
    f"{RUN}/scores/{{model}}.{{name}}.csv",
    model=STEERED_LMS,
    name=["lm_steering_calibration", "lm_steered_answers"],
)
REPORT_INPUTS += expand(f"{RUN}/renders/{{model}}/steered/index.csv", model=STEERED_LMS)


rule lm_steering:
    input:
        turns=f"{RUN}/lm/{{model}}/turns.csv",
        index=f"{RUN}/lm/{{model}}/caches.json",
        labels=f"{RUN}/lm/{{model}}/labels.h5",
        saes=(
            expand(
                f"{RUN}/lm/{{model}}/saes/residual.{{layer}}/{{file}}",
                layer=config["lm_steering"]["layers"],
                file=["config.json", "sae.safetensors"],
                allow_missing=True,
            )
            if needs_saes(config["lm_steering"])
            else []
        ),
        model=lambda wildcards: files_of(wildcards.model),
        manifest=talk_manifest("lm_steering"),
        asr=asr_files,
        script=code("lm_steering.py"),
    output:
        calibration=f"{RUN}/scores/{{model}}.lm_steering_calibration.csv",
        answers=f"{RUN}/scores/{{model}}.lm_steered_answers.csv",
        index=f"{RUN}/renders/{{model}}/steered/index.csv",
    log:
        f"{RUN}/logs/lm_steering.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_steering.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_steering",
            lambda wildcards: {
                **but(config["lm_steering"], "models"),
                **{key: config["lm_layers"][key] for key in ("l2", "epochs")},
                "model": but(model_config(config, wildcards.model), "stream"),
                "judges": config["judges"],
                "seed": SEED,
            },
            model=lambda wildcards: files_of(wildcards.model),
            speech=lambda wildcards: told_files("lm_steering"),
            asr=asr_files,
        ),
    message:
        "Steer {wildcards.model} while it speaks and judge what it says"
    script:
        "../workflow/scripts/lm_steering.py"
