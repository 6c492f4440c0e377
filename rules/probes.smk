rule probes:
    input:
        cache=f"{RUN}/activations/{{target}}.h5",
        labels=f"{RUN}/labels/{{target}}.h5",
        saes=FIRST_SAES,
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
