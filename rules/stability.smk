COMPARED = compared_targets(config)
SECTIONS["stability"] = {"targets": COMPARED}
TABLES += ["stability"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.stability.csv", target=COMPARED),
    *expand(f"{RUN}/stability/{{target}}.json", target=COMPARED),
]


rule stability:
    input:
        caches=lambda wildcards: [
            f"{RUN}/activations/{target}.h5"
            for target in sorted(
                {
                    t
                    for pair in pairs_of(config, wildcards.target)
                    for t in (pair.target_a, pair.target_b)
                }
            )
        ],
        saes=compared_saes,
        script=code("stability.py"),
    output:
        scores=f"{RUN}/scores/{{target}}.stability.csv",
        found=f"{RUN}/stability/{{target}}.json",
    log:
        f"{RUN}/logs/stability.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/stability.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg("stability", stability_slice),
    message:
        "Compare the features of the SAEs of {wildcards.target}"
    script:
        "../workflow/scripts/stability.py"
