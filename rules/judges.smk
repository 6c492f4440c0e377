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
        cfg=cfg("originals", asr=asr_files),
    message:
        "Transcribe the untouched test clips"
    script:
        "../workflow/scripts/originals.py"


rule judgements:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        index=f"{RUN}/renders/{{target}}/{{stage}}/index.csv",
        # The index may stay the same when the sound behind it changes; its signal scores do not.
        signal=f"{RUN}/scores/{{target}}.{{stage}}.signal.csv",
        originals=f"{RUN}/scores/originals.csv",
        asr=asr_files,
        script=code("judgements.py"),
    output:
        f"{RUN}/scores/{{target}}.{{stage}}.words.csv",
    log:
        f"{RUN}/logs/judgements.{{target}}.{{stage}}.log",
    benchmark:
        f"{RUN}/benchmarks/judgements.{{target}}.{{stage}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("judgements", asr=asr_files),
    message:
        "Judge words and voice of {wildcards.target}, {wildcards.stage}"
    script:
        "../workflow/scripts/judgements.py"
