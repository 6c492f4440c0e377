rule sae:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        script=code("sae.py"),
    output:
        config=f"{RUN}/saes/{{target}}/{{sae}}/seed{{seed}}/config.json",
        weights=f"{RUN}/saes/{{target}}/{{sae}}/seed{{seed}}/sae.safetensors",
        log=f"{RUN}/saes/{{target}}/{{sae}}/seed{{seed}}/log.csv",
    log:
        f"{RUN}/logs/sae.{{target}}.{{sae}}.{{seed}}.log",
    benchmark:
        f"{RUN}/benchmarks/sae.{{target}}.{{sae}}.{{seed}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("sae"),
    message:
        "Train SAE {wildcards.sae}, seed {wildcards.seed}, on {wildcards.target}"
    script:
        "../workflow/scripts/sae.py"


rule sae_grid:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        script=code("sae_grid.py"),
    output:
        front=f"{RUN}/saes/{{target}}/{{sae}}/grid/front.csv",
    log:
        f"{RUN}/logs/sae_grid.{{target}}.{{sae}}.log",
    benchmark:
        f"{RUN}/benchmarks/sae_grid.{{target}}.{{sae}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("sae_grid"),
    message:
        "Train the grid of SAE {wildcards.sae} on {wildcards.target}, all on one pass"
    script:
        "../workflow/scripts/sae_grid.py"


rule sae_scores:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=expand(
            f"{RUN}/saes/{{{{target}}}}/{{sae}}/seed{{seed}}/{{file}}",
            sae=SAES,
            seed=SEEDS,
            file=SAE_FILES,
        ),
        script=code("sae_scores.py"),
    output:
        scores=f"{RUN}/scores/{{target}}.sae.csv",
        summary=f"{RUN}/saes/{{target}}/saes.json",
    log:
        f"{RUN}/logs/sae_scores.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/sae_scores.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("sae_scores"),
    message:
        "Score the SAEs of {wildcards.target}"
    script:
        "../workflow/scripts/sae_scores.py"
