SPEAKING = config["speech_lm"]["models"]
SECTIONS["speech_lm"] = {"targets": SPEAKING}
TABLES += ["speech_lm"]
TABLE_INPUTS += expand(f"{RUN}/scores/{{model}}.answers.csv", model=SPEAKING)
REPORT_INPUTS += expand(f"{RUN}/renders/{{model}}/answers/index.csv", model=SPEAKING)


rule speech_lm_answers:
    input:
        model=lambda wildcards: files_of(wildcards.model),
        asr=asr_files,
        script=code("speech_lm_answers.py"),
    output:
        answers=f"{RUN}/scores/{{model}}.answers.csv",
        index=f"{RUN}/renders/{{model}}/answers/index.csv",
    log:
        f"{RUN}/logs/speech_lm_answers.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/speech_lm_answers.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "speech_lm_answers",
            lambda wildcards: {
                **but(config["speech_lm"], "models"),
                **but(config["judges"], "answer_window"),
                "model": model_config(config, wildcards.model),
            },
            model=lambda wildcards: files_of(wildcards.model),
            speech=lambda wildcards: clip_files(config["speech_lm"]["speech"]),
            asr=asr_files,
        ),
    message:
        "Let {wildcards.model} say held-out sentences"
    script:
        "../workflow/scripts/speech_lm_answers.py"
