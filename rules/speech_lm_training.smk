# A configuration with `speech_lm_training` trains a speech LM and scores what it says (config/train-tiny-moshi.yaml).
SPEECH_LM = f"{RUN}/speech_lm"
FINAL = SPOKEN = f"{RUN}/tables/speech_lm.csv"


rule speech_lm_speech:
    input:
        script=code("speech_lm_speech.py"),
    output:
        f"{RUN}/speech.csv",
    log:
        f"{RUN}/logs/speech_lm_speech.log",
    benchmark:
        f"{RUN}/benchmarks/speech_lm_speech.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "speech_lm_speech",
            lambda wildcards: {
                **{
                    key: config["speech_lm_training"][key]
                    for key in ("speech", "synthesis")
                },
                "seed": SEED,
            },
        ),
    message:
        "Speak sentences to learn from"
    script:
        "../workflow/scripts/speech_lm_speech.py"


rule speech_lm_training:
    input:
        spoken=(
            f"{RUN}/speech.csv" if "synthesis" in config["speech_lm_training"] else []
        ),
        script=code("speech_lm_training.py"),
    output:
        weights=f"{SPEECH_LM}/model.safetensors",
        config=f"{SPEECH_LM}/config.json",
        log=f"{SPEECH_LM}/log.csv",
    log:
        f"{RUN}/logs/speech_lm_training.log",
    benchmark:
        f"{RUN}/benchmarks/speech_lm_training.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "speech_lm_training",
            lambda wildcards: {
                **but(config["speech_lm_training"], "scores", "synthesis"),
                "seed": SEED,
            },
            data=speech_lm_files,
        ),
    message:
        "Train a speech LM"
    script:
        "../workflow/scripts/speech_lm_training.py"


rule speech_lm_scores:
    input:
        script=code("speech_lm_scores.py"),
        weights=f"{SPEECH_LM}/model.safetensors",
    output:
        answers=f"{RUN}/scores/speech_lm.answers.csv",
        index=f"{RUN}/renders/speech_lm/answers/index.csv",
    log:
        f"{RUN}/logs/speech_lm_scores.log",
    benchmark:
        f"{RUN}/benchmarks/speech_lm_scores.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "speech_lm_scores",
            lambda wildcards: {
                key: config["speech_lm_training"][key]
                for key in ("speech", "codec", "scores")
            },
            data=speech_lm_files,
        ),
    message:
        "Score what the speech LM says"
    script:
        "../workflow/scripts/speech_lm_scores.py"


rule speech_lm_table:
    input:
        answers=f"{RUN}/scores/speech_lm.answers.csv",
        script=code("speech_lm_table.py"),
    output:
        SPOKEN,
    log:
        f"{RUN}/logs/speech_lm_table.log",
    benchmark:
        f"{RUN}/benchmarks/speech_lm_table.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "speech_lm_table",
            lambda wildcards: {**config["tables"], "seed": SEED},
        ),
    message:
        "Tabulate what the speech LM says"
    script:
        "../workflow/scripts/speech_lm_table.py"
