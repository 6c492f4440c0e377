MAPPED = stage_targets(config, "importance", decoding=True)
# What makes the maps and chooses one on val, and what ablates on test; both remove the same shares.
MAPS = {
    key: config["importance"][key]
    for key in (
        "sae",
        "codebooks",
        "maps",
        "gradient_clips",
        "oracle_clips",
        "segment_seconds",
        "val_clips",
        "removed",
        "word_random_sets",
    )
}
ABLATIONS = {
    key: config["importance"][key]
    for key in (
        "codebooks",
        "clips",
        "removed",
        "word_removed",
        "random_sets",
        "word_random_sets",
        "modes",
    )
}
SOUNDS["importance"] = MAPPED
SECTIONS["importance"] = {"targets": MAPPED}
TABLES += ["importance_ablation", "importance_maps"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.importance.signal.csv", target=MAPPED),
    *expand(
        f"{RUN}/scores/{{target}}.importance_maps.{{part}}.csv",
        target=MAPPED,
        part=["oracle", "val"],
    ),
    *expand(f"{RUN}/importance/{{target}}.json", target=MAPPED),
]
REPORT_INPUTS += expand(f"{RUN}/renders/{{target}}/importance/index.csv", target=MAPPED)


rule importance_maps:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(lambda target: [config["importance"]["sae"]]),
        model=model_files,
        probes=probe_files(["centroid"], [config["importance"]["sae"]]),
        script=code("importance_maps.py"),
    output:
        maps=f"{RUN}/importance/{{target}}.json",
        oracle=f"{RUN}/scores/{{target}}.importance_maps.oracle.csv",
        val=f"{RUN}/scores/{{target}}.importance_maps.val.csv",
    log:
        f"{RUN}/logs/importance_maps.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/importance_maps.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "importance_maps",
            lambda wildcards: {**opened(wildcards), **MAPS, "seed": SEED},
            model=model_files,
        ),
    message:
        "Map importance in {wildcards.target} and choose a map on val"
    script:
        "../workflow/scripts/importance_maps.py"


rule importance_renders:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        maps=f"{RUN}/importance/{{target}}.json",
        model=model_files,
        script=code("importance_renders.py"),
        shards=renders_in_shards("importance"),
    output:
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
            lambda wildcards: {**opened(wildcards), **ABLATIONS, "seed": SEED},
            model=model_files,
            sounds=sounds_of("importance"),
        ),
    message:
        "Ablate {wildcards.target} by its importance maps"
    script:
        "../workflow/scripts/importance_renders.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule importance_renders as importance_renders_shard with:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        maps=f"{RUN}/importance/{{target}}.json",
        model=model_files,
        script=code("importance_renders.py"),
    output:
        shard_of("renders/{target}/importance"),
    log:
        f"{RUN}/logs/importance_renders.{{target}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/importance_renders.{{target}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Ablate {wildcards.target} by its importance maps: shard {wildcards.shard} of {wildcards.shards}"
