rule activations:
    input:
        manifest=manifest_of,
        model=model_files,
        script=code("activations.py"),
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


rule labels:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        phones=phone_inputs,
        script=code("labels.py"),
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
