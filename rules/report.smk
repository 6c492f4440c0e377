def tables_slice(wildcards):
    return {
        **config["tables"],
        "seed": SEED,
        "targets": TARGETS,
        "stages": SECTIONS,
        "properties": SECTIONS.get("probes", {}).get("properties", []),
        "models": {
            parse_target(target)[0]: config["models"][parse_target(target)[0]]
            for target in TARGETS
        },
        "steering_codebooks": SECTIONS.get("steering", {}).get("codebooks"),
        "saes": "saes" in SECTIONS,
        "bundled_speech": bundled_speech(config),
    }


def report_slice(wildcards):
    shown = but(config, "hardware") | {"data": but(config["data"], *DOWNLOAD)}
    return {"config": shown, "stages": SECTIONS}


rule tables:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        scores=TABLE_INPUTS,
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
        cfg=cfg("tables", tables_slice, training=training_records),
    message:
        "Compute the tables from the raw scores"
    script:
        "../workflow/scripts/tables.py"


rule report:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        tables=expand(f"{RUN}/tables/{{table}}.csv", table=TABLES),
        summary=f"{RUN}/tables/summary.json",
        scores=TABLE_INPUTS,
        sections=REPORT_INPUTS,
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
        cfg=cfg("report", report_slice, sounds=page_sounds),
    message:
        "Write the report"
    script:
        "../workflow/scripts/report.py"
