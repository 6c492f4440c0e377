LM_OPENED = config["lm_layers"]["models"]
LISTENING += [on_corpus(model, config["lm_layers"]["corpus"]) for model in LM_OPENED]
LM = f"{RUN}/lm/{{model}}"
SECTIONS["lm_layers"] = {
    "targets": LM_OPENED,
    "bins": config["lm_layers"]["bins"],
    "corpus": config["lm_layers"]["corpus"],
}
TABLES += ["lm_layers", "lm_heads", "lm_stability", "lm_saes", "lm_features"]
TABLE_INPUTS += expand(
    f"{RUN}/scores/{{model}}.{{part}}.csv",
    model=LM_OPENED,
    part=["lm_layers", "lm_heads.clips", "lm_saes", "lm_features"],
)
LM_SAES = expand(
    f"{LM}/saes/residual.{{layer}}/{{file}}",
    layer=config["lm_layers"]["sae"]["layers"],
    file=["config.json", "sae.safetensors", "log.csv"],
    allow_missing=True,
)


rule lm_caches:
    input:
        manifest=manifest_file(config["lm_layers"]["corpus"]),
        model=lambda wildcards: files_of(wildcards.model),
        asr=asr_files,
        script=code("lm_caches.py"),
    output:
        turns=f"{LM}/turns.csv",
        index=f"{LM}/caches.json",
    log:
        f"{RUN}/logs/lm_caches.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_caches.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_caches",
            lambda wildcards: {
                **{
                    key: config["lm_layers"][key]
                    for key in ("lead", "frames")
                    if key in config["lm_layers"]
                },
                # both streams, whichever its own targets hear
                "model": but(model_config(config, wildcards.model), "stream"),
                **{key: config["judges"][key] for key in ("asr", "beam")},
                "seed": SEED,
            },
            model=lambda wildcards: files_of(wildcards.model),
            words=lambda wildcards: word_files(config["lm_layers"]["corpus"]),
            asr=asr_files,
        ),
    message:
        "Cache every layer and head of {wildcards.model}, and a random network"
    script:
        "../workflow/scripts/lm_caches.py"


rule lm_labels:
    input:
        turns=f"{LM}/turns.csv",
        index=f"{LM}/caches.json",
        script=code("lm_labels.py"),
    output:
        f"{LM}/labels.h5",
    log:
        f"{RUN}/logs/lm_labels.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_labels.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_labels",
            lambda wildcards: {
                **config["labels"],
                "tokens": config["lm_layers"]["tokens"],
            },
        ),
    message:
        "Label what {wildcards.model} hears and says"
    script:
        "../workflow/scripts/lm_labels.py"


rule lm_layers:
    input:
        turns=f"{LM}/turns.csv",
        index=f"{LM}/caches.json",
        labels=f"{LM}/labels.h5",
        script=code("lm_layers.py"),
    output:
        layers=f"{RUN}/scores/{{model}}.lm_layers.csv",
        clips=f"{RUN}/scores/{{model}}.lm_heads.clips.csv",
        heads=f"{RUN}/scores/{{model}}.lm_heads.csv",
    log:
        f"{RUN}/logs/lm_layers.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_layers.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_layers",
            lambda wildcards: {
                **{
                    key: config["lm_layers"][key]
                    for key in ("properties", "bins", "lags")
                },
                "seed": SEED,
            },
        ),
    message:
        "Probe every layer and head of {wildcards.model}"
    script:
        "../workflow/scripts/lm_layers.py"


rule lm_saes:
    input:
        turns=f"{LM}/turns.csv",
        index=f"{LM}/caches.json",
        labels=f"{LM}/labels.h5",
        script=code("lm_saes.py"),
    output:
        saes=LM_SAES,
        scores=f"{RUN}/scores/{{model}}.lm_saes.csv",
        features=f"{RUN}/scores/{{model}}.lm_features.csv",
    log:
        f"{RUN}/logs/lm_saes.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_saes.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_saes",
            lambda wildcards: {
                **{
                    key: config["lm_layers"][key]
                    for key in ("sae", "bins", "l2", "epochs")
                },
                "seed": SEED,
            },
        ),
    message:
        "Train SAEs on layers of {wildcards.model} and say what their features stand for"
    script:
        "../workflow/scripts/lm_saes.py"
