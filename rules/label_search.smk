SEARCHED = searched_targets(config)
OF_FRAMES = [
    name
    for name in config["label_search"]["properties"]
    if REGISTERED[name].level == "frame"
]
SECTIONS["label_search"] = {"targets": SEARCHED}
TABLES += ["label_search"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.label_search.csv", target=SEARCHED),
    *expand(f"{RUN}/label_search/{{target}}.json", target=SEARCHED),
]


rule label_search:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5" if OF_FRAMES else [],
        saes=first_saes(lambda target: stage_saes(config, "label_search", target)),
        script=code("label_search.py"),
    output:
        scores=f"{RUN}/scores/{{target}}.label_search.csv",
        found=f"{RUN}/label_search/{{target}}.json",
    log:
        f"{RUN}/logs/label_search.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/label_search.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "label_search",
            lambda wildcards: {
                **but(config["label_search"], "targets", "corpora", "saes"),
                "seed": SEED,
            },
        ),
    message:
        "Seek the feature that tells each label of {wildcards.target} best"
    script:
        "../workflow/scripts/label_search.py"
