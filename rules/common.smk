import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile
from snakemake.logging import logger
from snakemake.resources import Resource

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from eqknobs.config import describe, plain, settle
from eqknobs.corpus.properties import PROPERTIES as REGISTERED
from eqknobs.errors import EqknobsError
from eqknobs.models.access import require_access
from eqknobs.models.moshi.memory import check as check_memory
from eqknobs.models import KINDS
from eqknobs.models.packaged import FILES as MODEL_FILES, PACKAGED, packaged
from eqknobs.plan import (
    SPEECH,
    as_drawn,
    bundled_models,
    bundled_speech,
    corpora_used,
    corpus_config,
    corpus_of,
    model_config,
    on_corpus,
    parse_target,
    parts_of,
    reference_saes,
    sae_home,
    stage_saes,
    stage_targets,
    trained_saes,
    training_record,
    voice_records,
    word_codebooks,
)
from eqknobs.progress import StageProgress
from eqknobs.stages.accent.checks import accent_models
from eqknobs.stages.domains.checks import domain_targets
from eqknobs.stages.erasing.checks import erased_targets, vowels_told
from eqknobs.stages.features.checks import caption_files, paged_targets
from eqknobs.stages.label_search.checks import searched_targets
from eqknobs.stages.phones.checks import phone_targets
from eqknobs.stages.saes.checks import spliced_saes
from eqknobs.stages.stability.pairs import compared_targets, pairs_of, sae_folder
from eqknobs.provenance import DIGESTS, code_inputs, corpus_files, module_inputs
from eqknobs.shards import MARK, most_clips, shards
from eqknobs.strict_yaml import read_yaml

try:
    # Snakemake's own reader takes the last of two equal keys without a word.
    for file in workflow.configfiles:
        read_yaml(file)
    settle(config, workflow.config_settings.config)
    if workflow.is_main_process:
        logger.info(describe(config, corpus_files))
        check_memory(config)
        if not any(isinstance(h, StageProgress) for h in logger.handlers):
            logger.addHandler(StageProgress(logger))
except EqknobsError as error:
    raise WorkflowError(str(error)) from None

RUN = f"results/{config['run']['name']}"
SEED = config["run"]["seed"]
TARGETS = config["run"]["targets"]
FIRST_SEED = min(config["sae_seeds"])
ENV = "../envs/eqknobs.yaml"
FINAL = f"{RUN}/report/index.html"  # a training has another end

# What the rule files of the stages add to, each its own; judges, tables and report read them.
SOUNDS = {}  # what makes sound -> its targets
RATED = set()  # of these, what DNSMOS rates too (column `dnsmos`)
TABLES = []  # names of tables
TABLE_INPUTS = []  # what tables and report read
REPORT_INPUTS = []  # what only the report reads
SAE_SCORES = []  # what the milestone `dictionaries` stops at
PROBES = []  # and `probings`
LISTENING = []  # models on corpora that a stage lets them hear, as targets are called
SECTIONS = (
    {}
)  # stage -> what of the run it works on: targets, and what else its section needs to know

# One GPU, one job on it, also when the user forgets `--resources gpu=1`. A cluster has as many as it has.
if (
    workflow.is_main_process
    and workflow.local_exec
    and "gpu" not in workflow.global_resources
):
    workflow.register_resource("gpu", Resource("gpu", 1))


wildcard_constraints:
    target=r"[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z_]+(\.[0-9]+)?(@[A-Za-z0-9][A-Za-z0-9_-]*)?",
    model="[A-Za-z0-9][A-Za-z0-9_-]*",
    corpus="[A-Za-z0-9][A-Za-z0-9_-]*",
    property="|".join(REGISTERED),
    sae="[A-Za-z0-9][A-Za-z0-9_-]*",
    seed="[0-9]+",
    shard="[0-9]+",
    shards="[0-9]+",


def script_of(rule):
    return Path(workflow.basedir) / "workflow" / "scripts" / f"{rule}.py"


def cfg(rule, slice, **sources):
    """The one parameter of a rule: its slice of the configuration, and digests of what it reads from outside results/.

    `slice` is a function of the wildcards, to a dictionary. The device is none of it: where something was computed does
    not decide what it is (`eqknobs.script` adds it). `sources` names functions of the wildcards that list files, or tell
    a digest themselves; the code of the rule's script is always among the digests.
    """

    def parameter(wildcards):
        content = {"code": code_inputs(script_of(rule))}
        content |= {name: found(wildcards) for name, found in sources.items()}
        for name, files in content.items():
            content[name] = (
                files if isinstance(files, str) else DIGESTS.of(outside(files))
            )
        return {**plain(slice(wildcards)), "content": dict(sorted(content.items()))}

    return parameter


def outside(files):
    """Files but those of a packaged model, which a rule of this workflow makes and Snakemake follows."""
    return [file for file in files if not packaged(Path(file).parent)]


def but(section, *keys):
    """A section of the configuration without some keys."""
    return {key: value for key, value in section.items() if key not in keys}


def opened(wildcards):
    """The slice of the model and site that a target is."""
    target = wildcards.target
    return {"model": model_config(config, target), "site": parse_target(target)[1]}


def probes_slice(wildcards):
    """The slice of a probe of one property, on one SAE's code or on the spaces that none makes: a category has neither
    bins nor lags."""
    category = REGISTERED[wildcards.property].kind == "category"
    keys = ("l2", "epochs") if category else ("l2", "epochs", "bins", "lags")
    return {
        **{key: config["probes"][key] for key in keys},
        "property": wildcards.property,
        "parts": ["sae" if wildcards.get("sae") else "base"],
        "seed": SEED,
    }


def of_homes(homes, path):
    """A file of each of the targets that `homes` lists for a model, of the SAE that steers against hallucination."""
    return lambda wildcards: [
        path.format(home=home, seed=FIRST_SEED, sae=config["hallucination"]["sae"])
        for home in homes[wildcards.model]
    ]


def first_saes(names):
    """The files of the first seed of each SAE that `names`, a function of the target, names."""
    return lambda wildcards: [
        f"{RUN}/saes/{sae_home(config, wildcards.target, sae)}/{sae}/seed{FIRST_SEED}/{file}"
        for sae in names(wildcards.target)
        for file in ("config.json", "sae.safetensors")
    ]


def every_seed(file):
    """A file of each seed of an SAE. Which seeds there are is no part of the slice: one that goes reruns no training."""
    return expand(
        f"{RUN}/saes/{{{{target}}}}/{{{{sae}}}}/seed{{seed}}/{file}",
        seed=sorted(config["sae_seeds"]),
    )


def probe_files(properties, saes):
    """The probes of a target on the base spaces and on the codes of these SAEs."""
    return [
        *(f"{RUN}/probes/{{target}}/{name}.npz" for name in properties),
        *(
            f"{RUN}/probes/{{target}}/{sae}/{name}.npz"
            for name in properties
            for sae in saes
        ),
    ]


def compared_saes(wildcards):
    """The files of every SAE in the pairs of a target, each once."""
    folders = {
        sae_folder(config, target, pair.sae, seed)
        for pair in pairs_of(config, wildcards.target)
        for target, seed in (
            (pair.target_a, pair.seed_a),
            (pair.target_b, pair.seed_b),
        )
    }
    return [
        f"{RUN}/saes/{folder}/{file}"
        for folder in sorted(folders)
        for file in ("config.json", "sae.safetensors")
    ]


def said_of_features(stage, targets):
    """The file in which a stage says of a target's features what they are; none where it does not work on the target.

    targets: the stage's function from the configuration to its targets.
    """
    table = stage in ("domains", "stability")
    file = f"{RUN}/scores/{{}}.{stage}.csv" if table else f"{RUN}/{stage}/{{}}.json"
    return lambda wildcards: [
        file.format(target) for target in targets(config) if target == wildcards.target
    ]


def stability_slice(wildcards):
    """The slice of the pairs of a target, and where their SAEs lie."""
    pairs = pairs_of(config, wildcards.target)
    return {
        **but(config["stability"], "targets", "corpora", "saes"),
        "pairs": [list(pair) for pair in pairs],
        "homes": {
            f"{target} {pair.sae}": sae_home(config, target, pair.sae)
            for pair in pairs
            for target in (pair.target_a, pair.target_b)
        },
        "seed": SEED,
    }


def importance_maps(wildcards):
    """The maps of a target, where they are made."""
    mapped = stage_targets(config, "importance", decoding=True)
    return (
        [f"{RUN}/importance/{wildcards.target}.json"]
        if wildcards.target in mapped
        else []
    )


def shard_of(job):
    """The mark of a shard of a job (`eqknobs.shards`), which goes when the job is done."""
    return temp(f"{RUN}/{job}{MARK}{{shard}}-of-{{shards}}")


def in_shards(job, output, clips, job_of=lambda wildcards: wildcards):
    """An input function: the marks of the shards in which a job's clips are done beforehand, where they are many.

    job: what the marks are called after, with wildcards. output: the job's first file. clips: a function from the
    wildcards to how many there are. job_of: one that gives the wildcards of another job, whose shards do this one's
    clips too.
    A file that is there keeps the shards that it was made with, so that another number is no other set of inputs.
    """

    def marks(wildcards):
        file = IOFile(f"{RUN}/{output.format(**dict(wildcards.items()))}")
        if Path(file).exists():
            return ancient(
                [
                    name
                    for name in workflow.persistence.input(file) or []
                    if MARK in name
                ]
            )
        number = shards(clips(wildcards), config["hardware"]["shard_clips"])
        name = f"{RUN}/{job.format(**dict(job_of(wildcards).items()))}{MARK}"
        found = [f"{name}{shard}-of-{number}" for shard in range(number)]
        return ancient(found) if number > 1 else []

    return marks


def renders_in_shards(sound):
    """As `in_shards`, of the renders of a stage."""
    folder = f"renders/{{target}}/{sound}"
    return in_shards(
        folder, f"{folder}/index.csv", lambda wildcards: config[sound]["clips"]
    )


def heard_clips(wildcards):
    """The most clips that a target hears."""
    return most_clips(config, corpus_of(wildcards.target))


def transcribed_clips(wildcards):
    """The most clips of a corpus of which untouched test clips are transcribed."""
    return most_clips(config, wildcards.get("corpus", SPEECH))


def judged_clips(wildcards):
    """The most clips of all renders that are judged, however many sounds are made of each."""
    return sum(
        config[sound]["clips"] * len(targets) for sound, targets in SOUNDS.items()
    )


def first_sibling(wildcards):
    """The first target of a target's model on its corpus: one pass serves all of them."""
    model, corpus = parse_target(wildcards.target)[0], corpus_of(wildcards.target)
    for target in WORKED_ON:
        if (parse_target(target)[0], corpus_of(target)) == (model, corpus):
            return {"target": target}
    return wildcards


def manifest_of(wildcards):
    """The manifest of the corpus that a target hears."""
    return manifest_file(corpus_of(wildcards.target))


def manifest_file(corpus):
    folder = "manifest" if corpus == SPEECH else f"manifest/{corpus}"
    return f"{RUN}/{folder}/manifest.csv"


def facts_file(corpus):
    """`corpus.json` in the folder of a corpus, which says what kind of speech it is; None without a folder."""
    path = corpus_config(config, corpus).get("path")
    return str(Path(path) / "corpus.json") if path else None


def corpus_facts(wildcards):
    """Those of the run's corpora, where they have any."""
    files = [facts_file(corpus) for corpus in CORPORA]
    return ancient(sorted({file for file in files if file and Path(file).is_file()}))


def really_runs():
    """Not a dry run, nor --summary, --dag and their like."""
    return workflow.executor_plugin is not None and not workflow.dryrun


def page_sounds(wildcards):
    return DIGESTS.of_sounds(f"{RUN}/report/index.html", really_runs())


def sounds_of(sound):
    """A mark of a stage's renders, which are made again when some of them are gone."""
    index = f"{RUN}/renders/{{}}/{sound}/index.csv"
    return lambda wildcards: DIGESTS.of_sounds(
        index.format(wildcards.target), really_runs()
    )


def code(script):
    """A script and every module of the package it imports, as inputs; their contents are in the rule's parameter."""
    return ancient(code_inputs(script_of(Path(script).stem)))


def gpu(wildcards):
    """1 where the job may use a GPU: CPU-only configurations run side by side."""
    return 0 if config["hardware"]["device"] == "cpu" else 1


def model_files(wildcards):
    """The files of the model that a target is of."""
    return files_of(parse_target(wildcards.target)[0])


def reference_files(wildcards):
    """The files of the model whose transcripts stand for texts, where one's do."""
    reference = (config["splicing"] or {}).get("reference")
    return files_of(reference) if reference else []


def reference_slice():
    """That model, as a part of a slice."""
    reference = (config["splicing"] or {}).get("reference")
    return {"reference": model_config(config, reference)} if reference else {}


def splicing_slice(wildcards):
    """The slice of what is lost downstream of a target's SAEs, with the model whose transcripts stand for texts."""
    splicing = but(config["splicing"], "targets", "saes", "seeds", "reference")
    return {**opened(wildcards), **splicing, **reference_slice()}


def files_of(name):
    """The code of a model's kind, and what is read of it in a local folder, and of its codec: other weights, other
    activations."""
    model = config["models"][name]
    made = packaged(model["path"])  # may not be there yet
    folders = [Path(model[key]) for key in ("path", "codec") if key in model]
    weights = [
        str(file)
        for folder in (folders[1:] if made else folders)
        for file in sorted(folder.glob("*"))
        if file.suffix in (".safetensors", ".model")
        or file.name
        in ("config.json", "preprocessor_config.json", "SpeechTokenizer.pt")
        or file.name.endswith(".index.json")
    ]
    found = ancient([*weights, *module_inputs(KINDS[model["kind"]].split(":")[0])])
    return [*(f"{model['path']}/{file}" for file in MODEL_FILES if made), *found]


def tables_slice():
    """What tables and report share (`eqknobs.evidence.stage.TablesCfg`)."""
    return {
        **config["tables"],
        "seed": SEED,
        "targets": WORKED_ON,
        "stages": SECTIONS,
        "word_codebooks": word_codebooks(config),
    }


def training_records(wildcards):
    """Which voices a bundled model heard in its own training."""
    names = {parse_target(target)[0] for target in WORKED_ON}
    records = sorted(training_record(config, name) for name in names)
    return ancient([record for record in records if Path(record).is_file()])


def every_core(wildcards):
    """All cores that Snakemake was given, on this machine; on a cluster what the configuration says."""
    return max(config["hardware"]["threads"], workflow.cores or 1)


def asr_files(wildcards):
    """The speech recogniser, where it is a folder."""
    folder = Path(config["judges"]["asr"])
    return ancient(sorted(str(file) for file in folder.glob("*") if file.is_file()))


def originals_file(corpus):
    """Transcripts of a corpus's untouched test clips."""
    name = "originals" if corpus == SPEECH else f"originals.{corpus}"
    return f"{RUN}/scores/{name}.csv"


def corpus_data(wildcards):
    """The configuration of the corpus that a rule draws, of speech where it has no such wildcard."""
    return corpus_config(config, wildcards.get("corpus", SPEECH))


def limit_as_drawn(wildcards):
    """Its `max_minutes`, as the last draw had it where neither limits that: another draw would be the same."""
    manifest = manifest_file(wildcards.get("corpus", SPEECH))
    limit = corpus_data(wildcards).get("max_minutes")
    return as_drawn(limit, Path(manifest).with_name("drawn.json"))


def label_files(wildcards):
    """The labels CSV, where one is configured."""
    path = corpus_data(wildcards).get("labels")
    return ancient([path] if path and Path(path).is_file() else [])


def phone_sources(wildcards):
    """Where the phones of a target's corpus are from, by what the ids of its clips begin with."""
    corpus = corpus_of(wildcards.target)
    data = corpus_config(config, corpus)
    parts = {f"{part}-": corpus_config(config, part) for part in data.get("of", [])}
    return {
        begin: part["phones"]
        for begin, part in (parts or {"": data}).items()
        if "phones" in part
    }


def phone_inputs(wildcards):
    """The files that those are read from."""
    found = []
    for path in map(Path, phone_sources(wildcards).values()):
        found += path.rglob("*.TextGrid") if path.is_dir() else [path]
    return ancient(sorted(str(file) for file in found if file.is_file()))


def labels_slice(wildcards):
    """The slice of frame labels: pitch where the target is probed, phones where the corpus has any."""
    phones = phone_sources(wildcards)
    probed = wildcards.target in stage_targets(config, "probes")
    labels = config["labels"] if probed else {**config["labels"], "crepe": None}
    return {**labels, **({"phones": phones} if phones else {})}


def speech_files(wildcards):
    """The sound of a corpus on this disk; that of LibriSpeech is known by its published checksum."""
    data = corpus_data(wildcards)
    source, path = data["source"], data.get("path")
    if source in ("librispeech", "union", "mixture"):
        return []
    if source == "synthesis":
        return [data["sentences"]]
    return corpus_files(path) if source == "folder" else [path]


def made_sounds(wildcards):
    """A mark of a synthetic corpus, which is made again when some of its clips are gone."""
    if corpus_data(wildcards)["source"] != "synthesis":
        return ""
    return DIGESTS.of_sounds(manifest_file(wildcards.corpus), really_runs())


def speech_lm_files(wildcards):
    """The clips that a speech LM learns from, with their word times, its codec, and the model that it starts as."""
    training = config["speech_lm_training"]
    folders = [training[key] for key in ("codec", "start") if key in training]
    return [
        *(file for folder in folders for file in Path(folder).glob("*")),
        *clip_files(training["speech"]),
    ]


def word_files(corpus):
    """What tells when the words of a corpus are spoken, where it lies beside the sound."""
    data = corpus_config(config, corpus)
    parts = [corpus_config(config, part) for part in data.get("of", [])] or [data]
    folders = [Path(part["path"]) for part in parts if part["source"] == "folder"]
    return sorted(
        str(file)
        for folder in folders
        for file in folder.rglob("*.json")
        if file.name != "corpus.json"
    )


def clip_files(folder):
    """Clips with word times: sound and JSON, in one folder a voice."""
    return sorted(Path(folder).glob("*/*.*"))


def told_files(stage):
    """The sentences that a speech LM is told to say in a stage, and the voices in which; none where people talk to it."""
    prompts = config[stage]["prompts"]
    return [] if prompts["source"] == "speech" else clip_files(prompts["sentences"])


def talk_manifest(stage):
    """The manifest of those who talk to it, where it is not told what to say."""
    talked_to = config[stage]["prompts"]["source"] == "speech"
    return [manifest_file(SPEECH)] if talked_to else []


def training_files(wildcards):
    """The speech that the codec learns from, and the codec that it starts as."""
    training = config["codec_training"]
    start = Path(training["start"]).glob("*") if "start" in training else []
    return [
        *start,
        *(file for folder in training["data"] for file in corpus_files(folder)),
    ]
