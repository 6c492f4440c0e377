wildcard_constraints:
    sound="|".join(SOUNDS) or "none",


TABLE_INPUTS += [
    f"{RUN}/scores/originals.csv",
    *(
        f"{RUN}/scores/{target}.{sound}.words.csv"
        for sound, targets in SOUNDS.items()
        for target in targets
    ),
]


rule originals:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        asr=asr_files,
        script=code("originals.py"),
    output:
        f"{RUN}/scores/originals.csv",
    log:
        f"{RUN}/logs/originals.log",
    benchmark:
        f"{RUN}/benchmarks/originals.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "originals", lambda wildcards: {"judges": config["judges"]}, asr=asr_files
        ),
    message:
        "Transcribe the untouched test clips"
    script:
        "../workflow/scripts/originals.py"


rule judgements:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        index=f"{RUN}/renders/{{target}}/{{sound}}/index.csv",
        # The index may stay the same when the sound behind it changes; its signal scores do not.
        signal=f"{RUN}/scores/{{target}}.{{sound}}.signal.csv",
        originals=f"{RUN}/scores/originals.csv",
        asr=asr_files,
        script=code("judgements.py"),
    output:
        f"{RUN}/scores/{{target}}.{{sound}}.words.csv",
    log:
        f"{RUN}/logs/judgements.{{target}}.{{sound}}.log",
    benchmark:
        f"{RUN}/benchmarks/judgements.{{target}}.{{sound}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "judgements", lambda wildcards: {"judges": config["judges"]}, asr=asr_files
        ),
    message:
        "Judge words and voice of {wildcards.target}, {wildcards.sound}"
    script:
        "../workflow/scripts/judgements.py"
