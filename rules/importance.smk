MAPPED = stage_targets(config, "importance", decoding=True)
SOUNDS["importance"] = MAPPED
SECTIONS["importance"] = {"targets": MAPPED}
TABLES += ["importance_ablation"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.importance.signal.csv", target=MAPPED),
    *expand(f"{RUN}/importance/{{target}}.json", target=MAPPED),
]
REPORT_INPUTS += expand(f"{RUN}/renders/{{target}}/importance/index.csv", target=MAPPED)


rule importance_renders:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(lambda target: [config["importance"]["sae"]]),
        model=model_files,
        probes=probe_files(["centroid"], [config["importance"]["sae"]]),
        script=code("importance_renders.py"),
    output:
        importance=f"{RUN}/importance/{{target}}.json",
        index=f"{RUN}/renders/{{target}}/importance/index.csv",
        signal=f"{RUN}/scores/{{target}}.importance.signal.csv",
    log:
        f"{RUN}/logs/importance_renders.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/importance_renders.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "importance_renders",
            lambda wildcards: {
                **opened(wildcards),
                **but(config["importance"], "targets", "corpora"),
                "seed": SEED,
            },
            model=model_files,
            sounds=sounds_of("importance"),
        ),
    message:
        "Map importance in {wildcards.target} and ablate"
    script:
        "../workflow/scripts/importance_renders.py"
