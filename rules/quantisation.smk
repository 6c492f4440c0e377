PACKED = stage_targets(config, "quantisation", decoding=True)
HEARD_KEYS = (
    "clips",
    "heard_clips",
    "heard_parts",
    "heard_widths",
    "heard_budgets",
    "heard_random",
)
# What makes the plans, and what tries them on test.
PLANS = but(config["quantisation"], "targets", "corpora", *HEARD_KEYS)
TRIED = {
    key: config["quantisation"][key] for key in ("codebooks", "parts", *HEARD_KEYS)
}
SOUNDS["quantisation"] = PACKED
RATED.add("quantisation")
SECTIONS["quantisation"] = {
    "targets": PACKED,
    "rounding": config["quantisation"]["roundings"][0],
}
TABLES += ["quantisation", "quantisation_equal_quality"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.quantisation.signal.csv", target=PACKED),
    *expand(f"{RUN}/scores/{{target}}.quantisation.time.csv", target=PACKED),
]
REPORT_INPUTS += expand(
    f"{RUN}/renders/{{target}}/quantisation/index.csv", target=PACKED
)


rule quantisation_plans:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        maps=importance_maps,
        model=model_files,
        script=code("quantisation_plans.py"),
    output:
        index=f"{RUN}/quantisation/{{target}}/index.csv",
        sensitivity=f"{RUN}/scores/{{target}}.quantisation.sensitivity.csv",
    log:
        f"{RUN}/logs/quantisation_plans.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/quantisation_plans.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "quantisation_plans",
            lambda wildcards: {**opened(wildcards), **PLANS, "seed": SEED},
            model=model_files,
        ),
    message:
        "Measure how sensitive the tensors of {wildcards.target} are, and make plans"
    script:
        "../workflow/scripts/quantisation_plans.py"


rule quantisation_renders:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        plans=f"{RUN}/quantisation/{{target}}/index.csv",
        model=model_files,
        script=code("quantisation_renders.py"),
        shards=renders_in_shards("quantisation"),
    output:
        index=f"{RUN}/renders/{{target}}/quantisation/index.csv",
        signal=f"{RUN}/scores/{{target}}.quantisation.signal.csv",
        time=f"{RUN}/scores/{{target}}.quantisation.time.csv",
    log:
        f"{RUN}/logs/quantisation_renders.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/quantisation_renders.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "quantisation_renders",
            lambda wildcards: {**opened(wildcards), **TRIED},
            model=model_files,
            sounds=sounds_of("quantisation"),
        ),
    message:
        "Pack {wildcards.target} by every plan and hear what is left"
    script:
        "../workflow/scripts/quantisation_renders.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule quantisation_renders as quantisation_renders_shard with:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        plans=f"{RUN}/quantisation/{{target}}/index.csv",
        model=model_files,
        script=code("quantisation_renders.py"),
    output:
        shard_of("renders/{target}/quantisation"),
    log:
        f"{RUN}/logs/quantisation_renders.{{target}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/quantisation_renders.{{target}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Pack {wildcards.target} by every plan and hear what is left: shard {wildcards.shard} of {wildcards.shards}"
