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
        cfg=cfg(
            "tables",
            lambda wildcards: tables_slice(),
            training=training_records,
        ),
    message:
        "Compute the tables from the raw scores"
    script:
        "../workflow/scripts/tables.py"


rule report:
    input:
        manifests=lambda wildcards: [manifest_file(corpus) for corpus in CORPORA],
        manifest=f"{RUN}/manifest/manifest.csv",
        corpora=corpus_facts,
        rejected=f"{RUN}/manifest/rejected.csv",
        training=training_records,
        tables=expand(f"{RUN}/tables/{{table}}.csv", table=TABLES),
        summary=f"{RUN}/tables/summary.json",
        scores=TABLE_INPUTS,
        sections=REPORT_INPUTS,
        script=code("report.py"),
    output:
        f"{RUN}/report/index.html",
        # The pages and their sounds, as Snakemake's own report is to hold them.
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
        cfg=cfg(
            "report",
            lambda wildcards: {
                "config": but(config, "hardware", "worked_on")
                | {"data": but(config["data"], *DOWNLOAD)},
                **tables_slice(),
                "training": {
                    name: training_record(config, name)
                    for name in bundled_models(config)
                },
                "bundled_speech": bundled_speech(config),
                "corpora": {
                    corpus: {
                        "manifest": manifest_file(corpus),
                        "facts": facts_file(corpus),
                    }
                    for corpus in CORPORA
                },
            },
            sounds=page_sounds,
            training=training_records,
            corpora=corpus_facts,
            captions=lambda wildcards: caption_files(config),
        ),
    message:
        "Write the report"
    script:
        "../workflow/scripts/report.py"
