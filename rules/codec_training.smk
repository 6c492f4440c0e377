# Not part of the analysis: a configuration with `codec_training` trains a codec instead (config/train-tiny-mimi.yaml).
FINAL = TRAINED = f"{RUN}/model/model.safetensors"


rule codec_training:
    input:
        script=code("codec_training.py"),
    output:
        weights=TRAINED,
        config=f"{RUN}/model/config.json",
        log=f"{RUN}/model/log.csv",
    log:
        f"{RUN}/logs/codec_training.log",
    benchmark:
        f"{RUN}/benchmarks/codec_training.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "codec_training",
            lambda wildcards: {**config["codec_training"], "seed": SEED},
            data=training_files,
        ),
    message:
        "Train a codec"
    script:
        "../workflow/scripts/codec_training.py"
