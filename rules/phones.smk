WITH_PHONES = phone_targets(config)
SECTIONS["phones"] = {"targets": WITH_PHONES}
TABLES += ["phones"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.phones.csv", target=WITH_PHONES),
    *expand(f"{RUN}/phones/{{target}}.json", target=WITH_PHONES),
]


rule phones:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(lambda target: stage_saes(config, "phones", target)),
        script=code("phones.py"),
    output:
        scores=f"{RUN}/scores/{{target}}.phones.csv",
        found=f"{RUN}/phones/{{target}}.json",
    log:
        f"{RUN}/logs/phones.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/phones.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "phones",
            lambda wildcards: {
                **but(config["phones"], "targets", "corpora", "saes"),
                "seed": SEED,
            },
        ),
    message:
        "Name the features of {wildcards.target} after phones"
    script:
        "../workflow/scripts/phones.py"
