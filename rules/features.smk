PAGED = paged_targets(config)
SECTIONS["features"] = {
    "targets": PAGED,
    "captions": next(iter(caption_files(config)), None),
}
TABLES += ["features"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.features.csv", target=PAGED),
    *expand(f"{RUN}/features/{{target}}.json", target=PAGED),
]
REPORT_INPUTS += [
    *expand(f"{RUN}/features/{{target}}.npz", target=PAGED),
    *expand(f"{RUN}/renders/{{target}}/features/index.csv", target=PAGED),
    *ancient(caption_files(config)),
]


rule features:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(lambda target: stage_saes(config, "features", target)),
        label_search=said_of_features("label_search", searched_targets),
        phones=said_of_features("phones", phone_targets),
        domains=said_of_features("domains", domain_targets),
        stability=said_of_features("stability", compared_targets),
        script=code("features.py"),
    output:
        scores=f"{RUN}/scores/{{target}}.features.csv",
        found=f"{RUN}/features/{{target}}.json",
        maps=f"{RUN}/features/{{target}}.npz",
        index=f"{RUN}/renders/{{target}}/features/index.csv",
    log:
        f"{RUN}/logs/features.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/features.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "features",
            lambda wildcards: {
                **but(config["features"], "targets", "corpora", "saes", "captions"),
                "seed": SEED,
            },
            sounds=sounds_of("features"),
        ),
    message:
        "Find what single features of {wildcards.target} hear"
    script:
        "../workflow/scripts/features.py"
