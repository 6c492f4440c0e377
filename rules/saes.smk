SEEDS = sorted(config["sae_seeds"])
DICTIONARIES = {}  # target, on the corpus that its SAEs hear -> their names
for target in TARGETS:
    for name in trained_saes(config, target):
        DICTIONARIES.setdefault(sae_home(config, target, name), []).append(name)
SAE_SCORES = expand(f"{RUN}/saes/{{target}}/saes.json", target=DICTIONARIES)
SPLICED = spliced_saes(config)
SECTIONS["saes"] = {"targets": list(DICTIONARIES)}
TABLES += ["sae", "splicing"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.sae.csv", target=DICTIONARIES),
    *SAE_SCORES,
    *expand(f"{RUN}/scores/{{target}}.splicing.csv", target=SPLICED),
]
REPORT_INPUTS += [
    file
    for target, names in DICTIONARIES.items()
    for name in names
    for file in (
        *expand(f"{RUN}/saes/{target}/{name}/seed{{seed}}/log.csv", seed=SEEDS),
        *(
            [f"{RUN}/saes/{target}/{name}/grid/front.csv"]
            if "grid" in config["saes"][name]
            else []
        ),
    )
]


rule sae:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        script=code("sae.py"),
    output:
        config=every_seed("config.json"),
        weights=every_seed("sae.safetensors"),
        log=every_seed("log.csv"),
    log:
        f"{RUN}/logs/sae.{{target}}.{{sae}}.log",
    benchmark:
        f"{RUN}/benchmarks/sae.{{target}}.{{sae}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "sae",
            lambda wildcards: {
                "sae": but(config["saes"][wildcards.sae], "grid", "targets", "corpus"),
            },
        ),
    message:
        "Train SAE {wildcards.sae} on {wildcards.target}, every seed"
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
        cfg=cfg(
            "sae_grid",
            lambda wildcards: {
                "sae": but(config["saes"][wildcards.sae], "targets", "corpus"),
                "seed": SEED,
            },
        ),
    message:
        "Train the grid of SAE {wildcards.sae} on {wildcards.target}, all on one pass"
    script:
        "../workflow/scripts/sae_grid.py"


rule sae_scores:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=lambda wildcards: expand(
            f"{RUN}/saes/{{target}}/{{sae}}/seed{{seed}}/{{file}}",
            target=wildcards.target,
            sae=DICTIONARIES[wildcards.target],
            seed=SEEDS,
            file=["config.json", "sae.safetensors"],
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
        cfg=cfg("sae_scores", lambda wildcards: {"seed": SEED}),
    message:
        "Score the SAEs of {wildcards.target}"
    script:
        "../workflow/scripts/sae_scores.py"


rule splicing:
    input:
        speech=manifest_file(SPEECH),
        non_speech=[
            manifest_file(corpus)
            for corpus in (config["splicing"] or {}).get("non_speech", [])
        ],
        cache=f"{RUN}/activations/{{target}}.h5",
        model=model_files,
        reference=reference_files,
        saes=lambda wildcards: expand(
            f"{RUN}/saes/{{target}}/{{sae}}/seed{{seed}}/{{file}}",
            target=wildcards.target,
            sae=SPLICED[wildcards.target],
            seed=SEEDS[: config["splicing"]["seeds"]],
            file=["config.json", "sae.safetensors"],
        ),
        script=code("splicing.py"),
    output:
        f"{RUN}/scores/{{target}}.splicing.csv",
    log:
        f"{RUN}/logs/splicing.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/splicing.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "splicing",
            splicing_slice,
            model=model_files,
            reference=reference_files,
        ),
    message:
        "Let {wildcards.target} go on from what its SAEs reconstruct"
    script:
        "../workflow/scripts/splicing.py"
