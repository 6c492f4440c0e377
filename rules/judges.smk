wildcard_constraints:
    sound="|".join(SOUNDS) or "none",


TABLE_INPUTS += [
    # Of speech also where nothing is judged: the page shows who says what.
    f"{RUN}/scores/originals.csv",
    *(
        originals_file(corpus)
        for corpus in {corpus_of(t) for targets in SOUNDS.values() for t in targets}
        if corpus != SPEECH
    ),
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


# Of a corpus beside the speech (`corpora`).
use rule originals as corpus_originals with:
    input:
        manifest=f"{RUN}/manifest/{{corpus}}/manifest.csv",
        asr=asr_files,
        script=code("originals.py"),
    output:
        f"{RUN}/scores/originals.{{corpus}}.csv",
    log:
        f"{RUN}/logs/originals.{{corpus}}.log",
    benchmark:
        f"{RUN}/benchmarks/originals.{{corpus}}.tsv"
    message:
        "Transcribe the untouched test clips of {wildcards.corpus}"


rule judgements:
    input:
        manifest=manifest_of,
        index=f"{RUN}/renders/{{target}}/{{sound}}/index.csv",
        # The index may stay the same when the sound behind it changes; its signal scores do not.
        signal=f"{RUN}/scores/{{target}}.{{sound}}.signal.csv",
        originals=lambda wildcards: originals_file(corpus_of(wildcards.target)),
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
