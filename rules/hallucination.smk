from eqknobs.stages.hallucination.checks import hallucinating, hallucination_layers

HALLUCINATING = hallucinating(config)
SECTIONS["hallucination"] = {
    "targets": HALLUCINATING,
    "non_speech": config["hallucination"]["non_speech"],
    "wer_margin": config["hallucination"]["wer_margin"],
    "tau": config["hallucination"]["tau"],
    "held_out": config["hallucination"]["held_out"],
}
TABLES += ["hallucination"]
TABLE_INPUTS += expand(f"{RUN}/scores/{{model}}.hallucination.csv", model=HALLUCINATING)
TABLE_INPUTS += expand(f"{RUN}/hallucination/{{model}}.json", model=HALLUCINATING)
REPORT_INPUTS += expand(
    f"{RUN}/renders/{{model}}/hallucination/index.csv", model=HALLUCINATING
)
# The layers at which a model is edited, on what their SAEs hear, in the order of the configuration.
HOMES = {
    model: list(hallucination_layers(config, model).values()) for model in HALLUCINATING
}
LISTENING += [home for model in HALLUCINATING for home in HOMES[model]]


rule hallucination:
    input:
        speech=manifest_file(SPEECH),
        non_speech=[
            manifest_file(corpus) for corpus in config["hallucination"]["non_speech"]
        ],
        heard=lambda wildcards: manifest_file(corpus_of(HOMES[wildcards.model][0])),
        caches=of_homes(HOMES, f"{RUN}/activations/{{home}}.h5"),
        model=lambda wildcards: files_of(wildcards.model),
        reference=reference_files,
        saes=of_homes(HOMES, f"{RUN}/saes/{{home}}/{{sae}}/seed{{seed}}/config.json"),
        weights=of_homes(
            HOMES, f"{RUN}/saes/{{home}}/{{sae}}/seed{{seed}}/sae.safetensors"
        ),
        script=code("hallucination.py"),
    output:
        scores=f"{RUN}/scores/{{model}}.hallucination.csv",
        chosen=f"{RUN}/hallucination/{{model}}.json",
        fitted=f"{RUN}/hallucination/{{model}}.npz",
        index=f"{RUN}/renders/{{model}}/hallucination/index.csv",
    log:
        f"{RUN}/logs/hallucination.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/hallucination.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "hallucination",
            lambda wildcards: {
                **but(config["hallucination"], "models", "sae"),
                "model": model_config(config, wildcards.model),
                **reference_slice(),
                "seed": SEED,
            },
            model=lambda wildcards: files_of(wildcards.model),
            reference=reference_files,
        ),
    message:
        "Keep {wildcards.model} from writing where nobody speaks"
    script:
        "../workflow/scripts/hallucination.py"
