HEARD = stage_targets(config, "codec", decoding=True)
SOUNDS["codec"] = HEARD
SECTIONS["codec"] = {"targets": HEARD, "training": voice_records(config, HEARD)}
TABLES += ["codec"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.codec.signal.csv", target=HEARD),
]
REPORT_INPUTS += expand(f"{RUN}/renders/{{target}}/codec/index.csv", target=HEARD)


rule codec_renders:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(lambda target: stage_saes(config, "codec", target)),
        model=model_files,
        script=code("codec_renders.py"),
        shards=renders_in_shards("codec"),
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
        cfg=cfg(
            "codec_renders",
            lambda wildcards: {
                **opened(wildcards),
                **but(config["codec"], "saes", "targets", "corpora"),
            },
            model=model_files,
            sounds=sounds_of("codec"),
        ),
    message:
        "Render the codec round trips of {wildcards.target}"
    script:
        "../workflow/scripts/codec_renders.py"


# Some of its clips beforehand, where they are many (hardware.shard_clips).
use rule codec_renders as codec_renders_shard with:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(lambda target: stage_saes(config, "codec", target)),
        model=model_files,
        script=code("codec_renders.py"),
    output:
        shard_of("renders/{target}/codec"),
    log:
        f"{RUN}/logs/codec_renders.{{target}}.{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/benchmarks/codec_renders.{{target}}.{{shard}}-of-{{shards}}.tsv"
    message:
        "Render the codec round trips of {wildcards.target}: shard {wildcards.shard} of {wildcards.shards}"
