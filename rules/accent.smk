ACCENTED = accent_models(config)
ACCENT_MANIFEST = (
    f"{RUN}/accent/corpus/manifest.csv"
    if config["accent"]["corpus"] is None
    else manifest_file(config["accent"]["corpus"])
)
SECTIONS["accent"] = {
    "targets": ACCENTED,
    "reference": config["accent"]["reference"],
    "synthetic": config["accent"]["corpus"] is None,
}
TABLES += ["accent"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{model}}.accent.csv", model=ACCENTED),
    *expand(f"{RUN}/scores/{{model}}.accent_clips.csv", model=ACCENTED),
    *expand(f"{RUN}/accent/{{model}}.json", model=ACCENTED),
]


if config["accent"]["corpus"] is None:

    rule accent_speech:
        input:
            sentences=ancient(config["accent"]["synthesis"]["sentences"]),
            script=code("accent_speech.py"),
        output:
            manifest=ACCENT_MANIFEST,
        log:
            f"{RUN}/logs/accent_speech.log",
        benchmark:
            f"{RUN}/benchmarks/accent_speech.tsv"
        conda:
            ENV
        threads: config["hardware"]["threads"]
        params:
            cfg=cfg(
                "accent_speech",
                lambda wildcards: {**config["accent"]["synthesis"], "seed": SEED},
                sentences=lambda wildcards: [
                    config["accent"]["synthesis"]["sentences"]
                ],
                sounds=lambda wildcards: DIGESTS.of_sounds(
                    ACCENT_MANIFEST, really_runs()
                ),
            ),
        message:
            "Let espeak-ng say sentences in every accent with every voice"
        script:
            "../workflow/scripts/accent_speech.py"


rule accent:
    input:
        manifest=ACCENT_MANIFEST,
        model=lambda wildcards: files_of(wildcards.model),
        script=code("accent.py"),
    output:
        runs=f"{RUN}/scores/{{model}}.accent.csv",
        clips=f"{RUN}/scores/{{model}}.accent_clips.csv",
        found=f"{RUN}/accent/{{model}}.json",
    log:
        f"{RUN}/logs/accent.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/accent.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "accent",
            lambda wildcards: {
                **but(config["accent"], "corpus", "synthesis", "codecs"),
                "codec": config["accent"]["codecs"][wildcards.model],
                "model": model_config(config, wildcards.model),
                "seed": SEED,
            },
            model=lambda wildcards: files_of(wildcards.model),
        ),
    message:
        "Look for the accent in sparse codes of {wildcards.model}"
    script:
        "../workflow/scripts/accent.py"
