from eqknobs.stages.lm_pruning.checks import needs_probes

PRUNED = config["lm_pruning"]["models"]
PROBED_HEADS = (
    [f"{RUN}/scores/{{model}}.lm_heads.csv"]
    if needs_probes(config["lm_pruning"])
    else []
)
PRUNED_SCORES = [
    "orders",
    "nats",
    "pruned_answers",
    "real_speech",
    "codebook_answers",
    "removal",
]
SECTIONS["lm_pruning"] = {"targets": PRUNED}
TABLES += ["lm_pruning", "lm_prunable", "lm_codebooks", "lm_removal", "lm_gates"]
TABLE_INPUTS += expand(
    f"{RUN}/scores/{{model}}.lm_{{name}}.csv", model=PRUNED, name=PRUNED_SCORES
)
REPORT_INPUTS += expand(f"{RUN}/renders/{{model}}/pruned/index.csv", model=PRUNED)


rule lm_pruning:
    input:
        model=lambda wildcards: files_of(wildcards.model),
        heads=PROBED_HEADS,
        manifest=talk_manifest("lm_pruning"),
        asr=asr_files,
        script=code("lm_pruning.py"),
    output:
        orders=f"{RUN}/scores/{{model}}.lm_orders.csv",
        nats=f"{RUN}/scores/{{model}}.lm_nats.csv",
        answers=f"{RUN}/scores/{{model}}.lm_pruned_answers.csv",
        real=f"{RUN}/scores/{{model}}.lm_real_speech.csv",
        codebooks=f"{RUN}/scores/{{model}}.lm_codebook_answers.csv",
        removal=f"{RUN}/scores/{{model}}.lm_removal.csv",
        index=f"{RUN}/renders/{{model}}/pruned/index.csv",
    log:
        f"{RUN}/logs/lm_pruning.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_pruning.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_pruning",
            lambda wildcards: {
                **but(config["lm_pruning"], "models"),
                "model": but(model_config(config, wildcards.model), "stream"),
                "judges": config["judges"],
            },
            model=lambda wildcards: files_of(wildcards.model),
            speech=lambda wildcards: told_files("lm_pruning"),
            asr=asr_files,
        ),
    message:
        "Prune {wildcards.model} and judge what it says"
    script:
        "../workflow/scripts/lm_pruning.py"
