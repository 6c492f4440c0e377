PROBED = stage_targets(config, "probes")
PROPERTIES = config["probes"]["properties"]
PROBED_SAES = {target: stage_saes(config, "probes", target) for target in PROBED}
PROBES = [
    file.format(target=target)
    for target in PROBED
    for file in probe_files(PROPERTIES, PROBED_SAES[target])
]
SECTIONS["probes"] = {
    "targets": PROBED,
    "properties": PROPERTIES,
    "saes": PROBED_SAES,
    "bins": config["probes"]["bins"],
}
TABLES += ["probes"]
TABLE_INPUTS += expand(
    f"{RUN}/scores/{{target}}.{{kind}}.{{property}}.csv",
    target=PROBED,
    kind=["probes", "ridge"],
    property=PROPERTIES,
)
TABLE_INPUTS += [
    f"{RUN}/scores/{target}.{kind}.{sae}.{name}.csv"
    for target in PROBED
    for kind in ("probes", "ridge")
    for sae in PROBED_SAES[target]
    for name in PROPERTIES
]


rule probes:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(lambda target: reference_saes(config, target)),
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
        cfg=cfg("probes", probes_slice),
    message:
        "Probe {wildcards.target} for {wildcards.property}"
    script:
        "../workflow/scripts/probes.py"


rule sae_probes:
    input:
        manifest=manifest_of,
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=lambda wildcards: first_saes(lambda target: [wildcards.sae])(wildcards),
        script=code("probes.py"),
    output:
        probes=f"{RUN}/probes/{{target}}/{{sae}}/{{property}}.npz",
        scores=f"{RUN}/scores/{{target}}.probes.{{sae}}.{{property}}.csv",
        ridge=f"{RUN}/scores/{{target}}.ridge.{{sae}}.{{property}}.csv",
    log:
        f"{RUN}/logs/sae_probes.{{target}}.{{sae}}.{{property}}.log",
    benchmark:
        f"{RUN}/benchmarks/sae_probes.{{target}}.{{sae}}.{{property}}.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    resources:
        gpu=gpu,
    params:
        cfg=cfg("probes", probes_slice),
    message:
        "Probe SAE {wildcards.sae} of {wildcards.target} for {wildcards.property}"
    script:
        "../workflow/scripts/probes.py"
