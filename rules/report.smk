SCORES = [
    f"{RUN}/scores/originals.csv",
    *expand(f"{RUN}/scores/{{target}}.sae.csv", target=TARGETS if SAES else []),
    *expand(f"{RUN}/saes/{{target}}/saes.json", target=TARGETS if SAES else []),
    *expand(
        f"{RUN}/scores/{{target}}.{{kind}}.{{property}}.csv",
        target=TARGETS,
        kind=["probes", "ridge"],
        property=PROPERTIES,
    ),
    *expand(
        f"{RUN}/scores/{{target}}.{{kind}}.{{sae}}.{{property}}.csv",
        target=TARGETS,
        kind=["probes", "ridge"],
        sae=SAES,
        property=PROPERTIES,
    ),
    *expand(
        f"{RUN}/scores/{{target}}.{{stage}}.{{kind}}.csv",
        target=CODEC_TARGETS,
        stage=SOUND_STAGES,
        kind=["signal", "words"],
    ),
    *expand(f"{RUN}/steering/{{target}}/calibration.json", target=CODEC_TARGETS),
    *expand(f"{RUN}/importance/{{target}}.json", target=CODEC_TARGETS),
]
TABLES = ["codec", "sae", "probes", "steering", "importance_ablation"]


rule tables:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        scores=SCORES,
        training=training_records,
        script=code("tables.py"),
    output:
        tables=expand(f"{RUN}/tables/{{table}}.csv", table=TABLES),
        summary=f"{RUN}/tables/summary.json",
    log:
        f"{RUN}/logs/tables.log",
    benchmark:
        f"{RUN}/benchmarks/tables.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg("tables", training=training_records),
    message:
        "Compute the tables from the raw scores"
    script:
        "../workflow/scripts/tables.py"


rule report:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        tables=expand(f"{RUN}/tables/{{table}}.csv", table=TABLES),
        summary=f"{RUN}/tables/summary.json",
        scores=SCORES,
        logs=expand(
            f"{RUN}/saes/{{target}}/{{sae}}/seed{{seed}}/log.csv",
            target=TARGETS,
            sae=SAES,
            seed=SEEDS,
        ),
        fronts=expand(
            f"{RUN}/saes/{{target}}/{{sae}}/grid/front.csv", target=TARGETS, sae=GRIDS
        ),
        sounds=expand(
            f"{RUN}/renders/{{target}}/{{stage}}/index.csv",
            target=CODEC_TARGETS,
            stage=SOUND_STAGES,
        ),
        script=code("report.py"),
    output:
        f"{RUN}/report/index.html",
        # The page and its sounds, as Snakemake's own report is to hold them.
        report(
            directory(f"{RUN}/report"),
            htmlindex="index.html",
            category="Report",
            caption="../docs/report.rst",
        ),
    log:
        f"{RUN}/logs/report.log",
    benchmark:
        f"{RUN}/benchmarks/report.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg("report", sounds=page_sounds),
    message:
        "Write the report"
    script:
        "../workflow/scripts/report.py"
