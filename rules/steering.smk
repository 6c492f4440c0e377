STEERED = stage_targets(config, "steering", decoding=True)
OTHER_ALPHA = {
    name: alpha
    for name, alpha in config["steering"]["other_alpha"].items()
    if name in config["probes"]["properties"]
}
STEERED_PROPERTIES = ["centroid", *sorted(OTHER_ALPHA)]
# What makes the vectors, and what else the calibration on val depends on.
VECTORS = {
    key: config["steering"][key]
    for key in (
        "saes",
        "codebooks",
        "binning",
        "low_bin",
        "high_bin",
        "clamp_features",
    )
}
CALIBRATION = ("val_clips", "shift", "tolerance", "alpha_max")
SOUNDS["steering"] = STEERED
SECTIONS["steering"] = {
    "targets": STEERED,
    "codebooks": config["steering"]["codebooks"],
    "shift": config["steering"]["shift"],
}
TABLES += ["steering"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.steering.signal.csv", target=STEERED),
    *expand(f"{RUN}/steering/{{target}}/calibration.json", target=STEERED),
]
REPORT_INPUTS += expand(f"{RUN}/renders/{{target}}/steering/index.csv", target=STEERED)


rule steering_calibration:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(lambda target: config["steering"]["saes"]),
        model=model_files,
        probes=probe_files(["centroid"], config["steering"]["saes"]),
        script=code("steering_calibration.py"),
    output:
        calibration=f"{RUN}/steering/{{target}}/calibration.json",
        scores=f"{RUN}/scores/{{target}}.calibration.csv",
    log:
        f"{RUN}/logs/steering_calibration.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/steering_calibration.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "steering_calibration",
            lambda wildcards: {
                **opened(wildcards),
                **VECTORS,
                **{key: config["steering"][key] for key in CALIBRATION},
                "seed": SEED,
            },
            model=model_files,
        ),
    message:
        "Calibrate every steering arm of {wildcards.target} to one shift"
    script:
        "../workflow/scripts/steering_calibration.py"


rule steering_renders:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(lambda target: config["steering"]["saes"]),
        model=model_files,
        probes=probe_files(STEERED_PROPERTIES, config["steering"]["saes"]),
        calibration=f"{RUN}/steering/{{target}}/calibration.json",
        script=code("steering_renders.py"),
        shards=renders_in_shards("steering"),
    output:
        index=f"{RUN}/renders/{{target}}/steering/index.csv",
        signal=f"{RUN}/scores/{{target}}.steering.signal.csv",
    log:
        f"{RUN}/logs/steering_renders.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/steering_renders.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "steering_renders",
            lambda wildcards: {
                **opened(wildcards),
                **VECTORS,
                **{
                    key: config["steering"][key]
                    for key in ("clips", "alphas", "listen")
                },
                "other_alpha": OTHER_ALPHA,
                "seed": SEED,
            },
            model=model_files,
            sounds=sounds_of("steering"),
        ),
    message:
        "Render steered sound from {wildcards.target}"
    script:
        "../workflow/scripts/steering_renders.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule steering_renders as steering_renders_shard with:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(lambda target: config["steering"]["saes"]),
        model=model_files,
        probes=probe_files(STEERED_PROPERTIES, config["steering"]["saes"]),
        calibration=f"{RUN}/steering/{{target}}/calibration.json",
        script=code("steering_renders.py"),
    output:
        shard_of("renders/{target}/steering"),
    log:
        f"{RUN}/logs/steering_renders.{{target}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/steering_renders.{{target}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Render steered sound from {wildcards.target}: shard {wildcards.shard} of {wildcards.shards}"
