DOWNLOAD = (
    "url",
    "timeout_seconds",
)  # how speech is fetched, not what: it has a published checksum


onstart:
    if any(
        data["source"] == "librispeech"
        for data in (config["data"], *config.get("corpora", {}).values())
    ):
        if any(
            job.rule.name in ("manifest", "corpus_manifest")
            for job in workflow.dag.needrun_jobs()
        ):
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
        drawn=f"{RUN}/manifest/drawn.json",
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
            lambda wildcards: {
                "data": but(
                    corpus_data(wildcards), *DOWNLOAD, "max_minutes", "phones"
                ),
                "max_minutes": limit_as_drawn(wildcards),
                "seed": SEED,
            },
            data=speech_files,
            labels=label_files,
            sounds=made_sounds,
        ),
    message:
        "Draw the manifest"
    script:
        "../workflow/scripts/manifest.py"


# A corpus beside the speech (`corpora`).
use rule manifest as corpus_manifest with:
    input:
        parts=lambda wildcards: [
            manifest_file(part) for part in parts_of(config, wildcards.corpus)
        ],
        labels=label_files,
        script=code("manifest.py"),
    output:
        manifest=f"{RUN}/manifest/{{corpus}}/manifest.csv",
        rejected=f"{RUN}/manifest/{{corpus}}/rejected.csv",
        drawn=f"{RUN}/manifest/{{corpus}}/drawn.json",
    log:
        f"{RUN}/logs/manifest.{{corpus}}.log",
    benchmark:
        f"{RUN}/benchmarks/manifest.{{corpus}}.tsv"
    message:
        "Draw the manifest of {wildcards.corpus}"
