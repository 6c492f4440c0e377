rule activations:
    input:
        manifest=manifest_of,
        model=model_files,
        script=code("activations.py"),
        shards=in_shards(
            "activations/{target}.h5",
            "activations/{target}.h5",
            heard_clips,
            first_sibling,
        ),
    output:
        f"{RUN}/activations/{{target}}.h5",
    log:
        f"{RUN}/logs/activations.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/activations.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "activations",
            lambda wildcards: {
                **opened(wildcards),
                # a budget of frames draws them
                **(
                    {**config["activations"], "seed": SEED}
                    if "activations" in config
                    else {}
                ),
            },
            model=model_files,
        ),
    message:
        "Cache activations of {wildcards.target}"
    script:
        "../workflow/scripts/activations.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule activations as activations_shard with:
    input:
        manifest=manifest_of,
        model=model_files,
        script=code("activations.py"),
    output:
        shard_of("activations/{target}.h5"),
    log:
        f"{RUN}/logs/activations.{{target}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/activations.{{target}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Cache activations of {wildcards.target}: shard {wildcards.shard} of {wildcards.shards}"


rule labels:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        phones=phone_inputs,
        script=code("labels.py"),
        shards=in_shards("labels/{target}.h5", "labels/{target}.h5", heard_clips),
    output:
        f"{RUN}/labels/{{target}}.h5",
    log:
        f"{RUN}/logs/labels.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/labels.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("labels", labels_slice, phones=phone_inputs),
    message:
        "Label pitch, loudness and brightness on the frames of {wildcards.target}"
    script:
        "../workflow/scripts/labels.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule labels as labels_shard with:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        phones=phone_inputs,
        script=code("labels.py"),
    output:
        shard_of("labels/{target}.h5"),
    log:
        f"{RUN}/logs/labels.{{target}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/labels.{{target}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Label pitch, loudness and brightness on the frames of {wildcards.target}: shard {wildcards.shard} of {wildcards.shards}"
