OF_DOMAINS = domain_targets(config)
SECTIONS["domains"] = {"targets": OF_DOMAINS}
TABLES += ["domains"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.domains.csv", target=OF_DOMAINS),
    *expand(f"{RUN}/domains/{{target}}.json", target=OF_DOMAINS),
]


rule domains:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        saes=first_saes(lambda target: stage_saes(config, "domains", target)),
        script=code("domains.py"),
    output:
        scores=f"{RUN}/scores/{{target}}.domains.csv",
        found=f"{RUN}/domains/{{target}}.json",
    log:
        f"{RUN}/logs/domains.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/domains.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "domains",
            lambda wildcards: {
                **but(config["domains"], "targets", "corpus", "saes"),
                "seed": SEED,
            },
        ),
    message:
        "Tell the features of {wildcards.target} apart by domain"
    script:
        "../workflow/scripts/domains.py"
