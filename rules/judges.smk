JUDGED = [(sound, target) for sound, targets in SOUNDS.items() for target in targets]
TABLE_INPUTS += [
    # Of speech also where only another corpus is judged: players show what a clip says.
    *([f"{RUN}/scores/originals.csv"] if JUDGED else []),
    *(
        originals_file(corpus)
        for corpus in {corpus_of(target) for _, target in JUDGED}
        if corpus != SPEECH
    ),
    *(f"{RUN}/scores/{target}.{sound}.words.csv" for sound, target in JUDGED),
]


rule originals:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        asr=asr_files,
        script=code("originals.py"),
        shards=in_shards(
            "scores/originals.csv", "scores/originals.csv", transcribed_clips
        ),
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
            "originals",
            lambda wildcards: {"judges": but(config["judges"], "answer_window")},
            asr=asr_files,
        ),
    message:
        "Transcribe the untouched test clips"
    script:
        "../workflow/scripts/originals.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule originals as originals_shard with:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        asr=asr_files,
        script=code("originals.py"),
    output:
        shard_of("scores/originals.csv"),
    log:
        f"{RUN}/logs/originals.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/originals.{{shard}}-of-{{shards}}.tsv"
    message:
        "Transcribe the untouched test clips: shard {wildcards.shard} of {wildcards.shards}"


# Of a corpus beside the speech (`corpora`).
use rule originals as corpus_originals with:
    input:
        manifest=f"{RUN}/manifest/{{corpus}}/manifest.csv",
        asr=asr_files,
        script=code("originals.py"),
        shards=in_shards(
            "scores/originals.{corpus}.csv",
            "scores/originals.{corpus}.csv",
            transcribed_clips,
        ),
    output:
        f"{RUN}/scores/originals.{{corpus}}.csv",
    log:
        f"{RUN}/logs/originals.{{corpus}}.log",
    benchmark:
        f"{RUN}/benchmarks/originals.{{corpus}}.tsv"
    message:
        "Transcribe the untouched test clips of {wildcards.corpus}"


use rule corpus_originals as corpus_originals_shard with:
    input:
        manifest=f"{RUN}/manifest/{{corpus}}/manifest.csv",
        asr=asr_files,
        script=code("originals.py"),
    output:
        shard_of("scores/originals.{corpus}.csv"),
    log:
        f"{RUN}/logs/originals.{{corpus}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/originals.{{corpus}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Transcribe the untouched test clips of {wildcards.corpus}: shard {wildcards.shard} of {wildcards.shards}"


# One job for all renders: the judges are loaded once, and what they know of a sound already costs them nothing.
if JUDGED:

    rule judgements:
        input:
            manifests=[manifest_file(corpus_of(target)) for _, target in JUDGED],
            indexes=[
                f"{RUN}/renders/{target}/{sound}/index.csv" for sound, target in JUDGED
            ],
            # An index may stay the same when the sound behind it changes; its signal scores do not.
            signals=[
                f"{RUN}/scores/{target}.{sound}.signal.csv" for sound, target in JUDGED
            ],
            originals=[originals_file(corpus_of(target)) for _, target in JUDGED],
            asr=asr_files,
            script=code("judgements.py"),
            shards=in_shards(
                "scores/judgements",
                f"scores/{JUDGED[0][1]}.{JUDGED[0][0]}.words.csv",
                judged_clips,
            ),
        output:
            [f"{RUN}/scores/{target}.{sound}.words.csv" for sound, target in JUDGED],
        log:
            f"{RUN}/logs/judgements.log",
        benchmark:
            f"{RUN}/benchmarks/judgements.tsv"
        conda:
            ENV
        threads: every_core
        resources:
            gpu=gpu,
        params:
            cfg=cfg(
                "judgements",
                lambda wildcards: {
                    "judges": but(config["judges"], "answer_window"),
                    "dnsmos": sorted(RATED & {sound for sound, _ in JUDGED}),
                },
                asr=asr_files,
            ),
        message:
            "Judge words and voice of all renders"
        script:
            "../workflow/scripts/judgements.py"

    # Some of its sounds beforehand, where clips are many (hardware.shard_clips).
    use rule judgements as judgements_shard with:
        input:
            manifests=[manifest_file(corpus_of(target)) for _, target in JUDGED],
            indexes=[
                f"{RUN}/renders/{target}/{sound}/index.csv" for sound, target in JUDGED
            ],
            signals=[
                f"{RUN}/scores/{target}.{sound}.signal.csv" for sound, target in JUDGED
            ],
            originals=[originals_file(corpus_of(target)) for _, target in JUDGED],
            asr=asr_files,
            script=code("judgements.py"),
        output:
            shard_of("scores/judgements"),
        log:
            f"{RUN}/logs/judgements.{{shard}}-of-{{shards}}.log",
        benchmark:
            f"{RUN}/benchmarks/judgements.{{shard}}-of-{{shards}}.tsv"
        message:
            "Judge words and voice of all renders: shard {wildcards.shard} of {wildcards.shards}"
