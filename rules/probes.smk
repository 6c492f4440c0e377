PROBED = stage_targets(config, "probes")
PROPERTIES = config["probes"]["properties"]
PROBES = expand(
    f"{RUN}/probes/{{target}}/{{property}}.npz", target=PROBED, property=PROPERTIES
)
SECTIONS["probes"] = {
    "targets": PROBED,
    "properties": PROPERTIES,
    "bins": config["probes"]["bins"],
}
TABLES += ["probes"]
TABLE_INPUTS += expand(
    f"{RUN}/scores/{{target}}.{{kind}}.{{property}}.csv",
    target=PROBED,
    kind=["probes", "ridge"],
    property=PROPERTIES,
)


rule probes:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(lambda target: stage_saes(config, "probes", target)),
        script=code("probes.py"),
    output:
        probes=f"{RUN}/probes/{{target}}/{{property}}.npz",
        scores=f"{RUN}/scores/{{target}}.probes.{{property}}.csv",
        ridge=f"{RUN}/scores/{{target}}.ridge.{{property}}.csv",
    log:
        f"{RUN}/logs/probes.{{target}}.{{property}}.log",
    benchmark:
        f"{RUN}/benchmarks/probes.{{target}}.{{property}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg(
            "probes",
            lambda wildcards: {
                **but(config["probes"], "properties", "saes", "targets"),
                "property": wildcards.property,
                "seed": SEED,
            },
        ),
    message:
        "Probe {wildcards.target} for {wildcards.property}"
    script:
        "../workflow/scripts/probes.py"
