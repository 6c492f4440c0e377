rule probes:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(reference_saes(config)),
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
        cfg=cfg("probes"),
    message:
        "Probe {wildcards.target} for {wildcards.property}"
    script:
        "../workflow/scripts/probes.py"


rule sae_probes:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=first_saes(["{sae}"]),
        script=code("sae_probes.py"),
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
        cfg=cfg("sae_probes"),
    message:
        "Probe SAE {wildcards.sae} of {wildcards.target} for {wildcards.property}"
    script:
        "../workflow/scripts/sae_probes.py"
