RECOVERED = config["lm_recipe"]["models"]
SECTIONS["lm_recipe"] = {"targets": RECOVERED}
TABLES += ["lm_recipe", "lm_recovery"]
TABLE_INPUTS += expand(
    f"{RUN}/{{file}}",
    file=[
        file.format(model=model)
        for model in RECOVERED
        for file in (
            "scores/{model}.lm_recipe_answers.csv",
            "scores/{model}.lm_recipe_paces.csv",
            "lm/{model}/recipe.json",
        )
    ],
)
REPORT_INPUTS += expand(f"{RUN}/renders/{{model}}/recipe/index.csv", model=RECOVERED)


rule lm_recipe:
    input:
        model=lambda wildcards: files_of(wildcards.model),
        orders=f"{RUN}/scores/{{model}}.lm_orders.csv",
        asr=asr_files,
        script=code("lm_recipe.py"),
    output:
        answers=f"{RUN}/scores/{{model}}.lm_recipe_answers.csv",
        paces=f"{RUN}/scores/{{model}}.lm_recipe_paces.csv",
        recipe=f"{RUN}/lm/{{model}}/recipe.json",
        whole=directory(f"{RUN}/lm/{{model}}/whole"),
        model=directory(f"{RUN}/lm/{{model}}/recipe"),
        index=f"{RUN}/renders/{{model}}/recipe/index.csv",
    log:
        f"{RUN}/logs/lm_recipe.{{model}}.log",
    benchmark:
        f"{RUN}/benchmarks/lm_recipe.{{model}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "lm_recipe",
            lambda wildcards: {
                **but(config["lm_recipe"], "models"),
                "model": but(model_config(config, wildcards.model), "stream"),
                "judges": config["judges"],
                "bootstrap": config["tables"]["bootstrap"],
                "seed": SEED,
            },
            model=lambda wildcards: files_of(wildcards.model),
            speech=lambda wildcards: clip_files(
                config["lm_recipe"]["prompts"]["sentences"]
            ),
            asr=asr_files,
        ),
    message:
        "Make {wildcards.model} smaller, train it again and judge what it says"
    script:
        "../workflow/scripts/lm_recipe.py"
