DOWNLOAD = (
    "url",
    "timeout_seconds",
)  # how speech is fetched, not what: it has a published checksum


onstart:
    if config["data"]["source"] == "librispeech":
        if any(job.rule.name == "manifest" for job in workflow.dag.needrun_jobs()):
            try:
                require_access(config)
            except EqknobsError as error:
                raise WorkflowError(str(error)) from None


rule manifest:
    input:
        labels=label_files,
        script=code("manifest.py"),
    output:
        manifest=f"{RUN}/manifest/manifest.csv",
        rejected=f"{RUN}/manifest/rejected.csv",
    log:
        f"{RUN}/logs/manifest.log",
    benchmark:
        f"{RUN}/benchmarks/manifest.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg(
            "manifest",
            lambda wildcards: {"data": but(config["data"], *DOWNLOAD), "seed": SEED},
            data=speech_files,
            labels=label_files,
        ),
    message:
        "Draw the manifest"
    script:
        "../workflow/scripts/manifest.py"
