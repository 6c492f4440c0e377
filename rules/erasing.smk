ERASED = erased_targets(config)
SECTIONS["erasing"] = {
    "targets": ERASED,
    "tolerance": config["erasing"]["tolerance"],
}
TABLES += ["topk_probing", "unlearning", "ravel"]
TABLE_INPUTS += [
    *expand(f"{RUN}/scores/{{target}}.erasing.csv", target=ERASED),
    *expand(f"{RUN}/scores/{{target}}.erasing_clips.csv", target=ERASED),
    *expand(f"{RUN}/scores/{{target}}.erasing_swaps.csv", target=ERASED),
    *expand(f"{RUN}/erasing/{{target}}.json", target=ERASED),
]


rule erasing:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=lambda wildcards: (
            [f"{RUN}/labels/{wildcards.target}.h5"]
            if vowels_told(config, wildcards.target)
            else []
        ),
        saes=first_saes(lambda target: stage_saes(config, "erasing", target)),
        script=code("erasing.py"),
    output:
        probes=f"{RUN}/scores/{{target}}.erasing.csv",
        clips=f"{RUN}/scores/{{target}}.erasing_clips.csv",
        swaps=f"{RUN}/scores/{{target}}.erasing_swaps.csv",
        found=f"{RUN}/erasing/{{target}}.json",
    log:
        f"{RUN}/logs/erasing.{{target}}.log",
    benchmark:
        f"{RUN}/benchmarks/erasing.{{target}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "erasing",
            lambda wildcards: {
                **but(config["erasing"], "targets", "saes", "tasks", "tolerance"),
                "tasks": sorted(
                    config["erasing"]["tasks"][corpus_of(wildcards.target)]
                ),
                "seed": SEED,
            },
        ),
    message:
        "Tell labels of {wildcards.target} from few features, and erase them"
    script:
        "../workflow/scripts/erasing.py"
