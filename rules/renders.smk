STEERED = [
    "centroid",
    *sorted(set(config["steering"]["other_alpha"]) & set(PROPERTIES)),
]


rule codec_renders:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(SAES),
        model=model_files,
        script=code("codec_renders.py"),
    output:
        index=f"{RUN}/renders/{{target}}/codec/index.csv",
        signal=f"{RUN}/scores/{{target}}.codec.signal.csv",
    log:
        f"{RUN}/logs/codec_renders.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/codec_renders.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("codec_renders", model=model_files, sounds=sounds_of("codec")),
    message:
        "Render the codec round trips of {wildcards.target}"
    script:
        "../workflow/scripts/codec_renders.py"


rule steering_calibration:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(config["steering"]["saes"]),
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
        cfg=cfg("steering_calibration", model=model_files),
    message:
        "Calibrate every steering arm of {wildcards.target} to one shift"
    script:
        "../workflow/scripts/steering_calibration.py"


rule steering_renders:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(config["steering"]["saes"]),
        model=model_files,
        probes=probe_files(STEERED, config["steering"]["saes"]),
        calibration=f"{RUN}/steering/{{target}}/calibration.json",
        script=code("steering_renders.py"),
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
        cfg=cfg("steering_renders", model=model_files, sounds=sounds_of("steering")),
    message:
        "Render steered sound from {wildcards.target}"
    script:
        "../workflow/scripts/steering_renders.py"


rule importance_renders:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes([config["importance"]["sae"]]),
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
        cfg=cfg("importance_renders", model=model_files, sounds=sounds_of("importance")),
    message:
        "Map importance in {wildcards.target} and ablate"
    script:
        "../workflow/scripts/importance_renders.py"
