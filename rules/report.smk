def tables_slice(wildcards):
    return {
        **config["tables"],
        "seed": SEED,
        "targets": WORKED_ON,
        "stages": SECTIONS,
        # at which the codec's own word errors say whether words can be judged
        "word_codebooks": (
            SECTIONS["steering"]["codebooks"]
            if "steering" in SECTIONS
            else max((config["codec"] or {"codebooks": [0]})["codebooks"])
        ),
    }


def report_slice(wildcards):
    return {
        "config": but(config, "hardware") | {"data": but(config["data"], *DOWNLOAD)},
        "targets": WORKED_ON,
        "stages": SECTIONS,
        "training": {
            name: training_record(config, name) for name in bundled_models(config)
        },
        "bundled_speech": bundled_speech(config),
    }


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
        rejected=f"{RUN}/manifest/rejected.csv",
        training=training_records,
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
        cfg=cfg("report", report_slice, sounds=page_sounds, training=training_records),
    message:
        "Write the report"
    script:
        "../workflow/scripts/report.py"
