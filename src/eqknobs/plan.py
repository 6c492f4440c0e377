"""What of a run each stage works on: its targets and SAEs, read from the configuration alone."""

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError

DECODING = ("mimi", "encodec", "dac", "speechtokenizer")  # kinds that turn activations back into sound
SPEECH = "speech"  # the corpus that `data` describes; a target's name says nothing about it


def parse_target(target: str) -> tuple[str, str]:
    """Split "tiny-mimi.encoder_layer.2" or "tiny-mimi.encoder_layer.2@music" into the model "tiny-mimi" and the site
    "encoder_layer.2"."""
    model, _, site = without_corpus(target).partition(".")
    return model, site


def layer_of(target: str) -> int | float:
    """The number of the layer that a target is, from 0; NaN where it is none."""
    last = parse_target(target)[1].rpartition(".")[2]
    return int(last) if last.isdigit() else math.nan


def corpus_of(target: str) -> str:
    """The corpus whose sound a target hears: "music" of "tiny-mimi.encoder_layer.2@music", else speech."""
    return target.partition("@")[2] or SPEECH


def on_corpus(target: str, corpus: str) -> str:
    """A target on another corpus."""
    target = without_corpus(target)
    return target if corpus == SPEECH else f"{target}@{corpus}"


def without_corpus(target: str) -> str:
    """A target's model and site."""
    return target.partition("@")[0]


def corpus_config(config: dict[str, Any], corpus: str) -> dict[str, Any]:
    """Where a corpus is from and how it is drawn: `data`, or a section of `corpora`."""
    return config["data"] if corpus == SPEECH else config["corpora"][corpus]


def as_drawn(max_minutes: float | None, record: Path) -> float | None:
    """`max_minutes` of a corpus, as it was at the last draw where neither value limits that.

    record: `drawn.json` of that draw: `max_minutes`, `seconds` (drawn) and `limited` (whether the limit left any clip
    out). So a limit that does not bind reruns nothing. A union has none.
    """
    try:
        drawn = json.loads(record.read_text())
        free = not drawn["limited"] and max_minutes is not None and 60 * max_minutes >= drawn["seconds"]
        return drawn["max_minutes"] if free else max_minutes
    except (OSError, ValueError, KeyError):  # a first draw
        return max_minutes


def corpora_used(config: dict[str, Any], targets: list[str]) -> list[str]:
    """The corpora that targets hear, and what those are put together from, in a fixed order."""
    found = {corpus_of(target) for target in targets}
    return sorted(found.union(*(parts_of(config, corpus) for corpus in found)))


def parts_of(config: dict[str, Any], corpus: str) -> list[str]:
    """The corpora that one is made of: what is put together, and what is mixed in; none of one that is drawn."""
    found = corpus_config(config, corpus)
    return [*found.get("of", []), *found.get("noise", [])]


def model_config(config: dict[str, Any], target: str) -> dict[str, Any]:
    """What `eqknobs.models.load_model` takes, for the model of a target; the device is added when the job runs."""
    name, _ = parse_target(target)
    return {"name": name, **config["models"][name]}


def decodes(config: dict[str, Any], target: str) -> bool:
    """Whether the target's model turns activations back into sound (a codec), so that it can be steered."""
    return config["models"][parse_target(target)[0]]["kind"] in DECODING


def stage_targets(config: dict[str, Any], stage: str, decoding: bool = False) -> list[str]:
    """The targets of the run that a stage works on, each on every corpus that the stage lists (speech by default); none
    where it is null.

    decoding: whether it makes sound, so that by default only targets that decode are its. Raises EqknobsError where
    `<stage>.targets` names one that the run has not, or that does not decode, or an unknown corpus is named.
    """
    if not config.get(stage):
        return []
    wanted = config[stage].get("targets", [])
    for target in map(without_corpus, wanted):
        if decoding and target in config["run"]["targets"] and not decodes(config, target):
            raise EqknobsError(f"config: {stage}.targets: {target!r} is no codec: it makes no sound; leave it out")
    corpora = config[stage].get("corpora", [SPEECH])
    for corpus in corpora:
        check_corpus(config, f"{stage}.corpora", corpus)
    found = chosen_targets(config, f"{stage}.targets", wanted, corpora)
    return [target for target in found if not decoding or decodes(config, target)]


def chosen_targets(
    config: dict[str, Any], key: str, wanted: list[str], corpora: Sequence[str] = (SPEECH,)
) -> list[str]:
    """What a list of targets chooses of the run's, in their order, each on these corpora, or on the one after its `@`.

    wanted: targets, with `*` for whatever stands there; `!` before one takes out of all what it fits; an empty list is
    all. What holds a `*` may fit nothing, so that a list also goes with another run's targets. Raises EqknobsError,
    naming the key, for another target that the run has not, or an unknown corpus.
    """
    targets = config["run"]["targets"]
    out = [name[1:] for name in wanted if name.startswith("!")]
    also = [name for name in wanted if not name.startswith("!")]
    left = [t for t in targets if not any(fnmatchcase(t, name) for name in out)] if out or not also else []
    found = {on_corpus(target, corpus) for target in left for corpus in corpora}
    for name in also:
        _, at, corpus = name.partition("@")
        own = [target for target in targets if fnmatchcase(target, without_corpus(name))]
        if not own and "*" not in name:
            raise EqknobsError(f"config: {key}: {name!r} is not under run.targets; add it there")
        if at and own:
            check_corpus(config, key, corpus)
        found |= {on_corpus(target, one) for target in own for one in ([corpus] if at else corpora)}
    order = [*corpora, *sorted({corpus_of(target) for target in found} - set(corpora))]
    every = (on_corpus(target, corpus) for target in targets for corpus in order)
    return [target for target in every if target in found]


def check_corpus(config: dict[str, Any], key: str, corpus: str) -> None:
    """Raises EqknobsError, naming the key, where there is no such corpus."""
    known = [SPEECH, *config.get("corpora", {})]
    if corpus not in known:
        raise EqknobsError(f"config: {key}: names the corpus {corpus!r}, which is not one of {', '.join(known)}")


def trained_saes(config: dict[str, Any], target: str) -> list[str]:
    """The names of the SAEs that are trained on a target, on whatever corpus, sorted."""
    target = without_corpus(target)
    return sorted(
        name
        for name, sae in (config["saes"] or {}).items()
        if target in chosen_targets(config, f"saes.{name}.targets", sae.get("targets", []))
    )


def sae_home(config: dict[str, Any], target: str, name: str) -> str:
    """The target, on the SAE's own corpus, under which an SAE lies; other corpora may be read with it."""
    return on_corpus(target, config["saes"][name].get("corpus", SPEECH))


def stage_saes(config: dict[str, Any], stage: str, target: str) -> list[str]:
    """Those of `trained_saes` that a stage reads: all, or the ones that `<stage>.saes` names."""
    trained = trained_saes(config, target)
    return [name for name in trained if name in config[stage].get("saes", trained)]


def reference_saes(config: dict[str, Any], target: str) -> list[str]:
    """The SAEs that may give `pca_l0` and `random_topk` their sizes: the one `probes.reference` names, else all."""
    probed, reference = stage_saes(config, "probes", target), config["probes"]["reference"]
    return [reference] if reference in probed else probed


def check_saes(config: dict[str, Any], key: str, names: list[str]) -> None:
    """Raises EqknobsError, naming the key, where one of the names is no SAE of the configuration."""
    missing = sorted(set(names) - set(config["saes"] or {}))
    if missing and not config["saes"]:
        raise EqknobsError(f"config: {key}: names {missing[0]!r}, but saes is null; define it, or name none in {key}")
    if missing:
        raise EqknobsError(
            f"config: {key}: names {missing[0]!r}, which is not under saes ({', '.join(sorted(config['saes']))}); "
            f"name one of these in {key}, or define {missing[0]}"
        )


def check_probed(config: dict[str, Any], stage: str, saes: list[str]) -> None:
    """Raises EqknobsError where a stage's targets or SAEs are not probed, or not for the centroid.

    saes: those whose probes the stage reads.
    """
    probes = config["probes"]
    if not probes:
        raise EqknobsError(f"config: {stage}: needs probes; configure them, or set {stage}: null")
    if "centroid" not in probes["properties"]:
        raise EqknobsError(
            f"config: probes.properties: must hold 'centroid', which {stage} needs; or set {stage}: null"
        )
    for target in stage_targets(config, stage, decoding=True):
        if target not in stage_targets(config, "probes"):
            raise EqknobsError(f"config: {stage}: needs probes of {target}, which probes.targets leaves out")
        for name in saes:
            if name not in trained_saes(config, target):
                raise EqknobsError(
                    f"config: {stage}: needs SAE {name!r} of {target}, which saes.{name}.targets leaves out"
                )
            if name not in stage_saes(config, "probes", target):
                raise EqknobsError(f"config: {stage}: needs probes of SAE {name!r}, which probes.saes leaves out")


def bundled(path: str | Path) -> bool:
    """Whether a file or folder is one that comes with this project, below resources/."""
    return Path(path).resolve().is_relative_to(Path("resources").resolve())


def models_used(config: dict[str, Any]) -> list[str]:
    """Names of the models that the run opens or lets speak, sorted."""
    used = {parse_target(target)[0] for target in config["run"]["targets"]}
    stages = (config.get(stage) or {} for stage in ("speech_lm", "lm_layers"))
    accent = (config.get("accent") or {}).get("codecs", {})
    reference = (config.get("splicing") or {}).get("reference")
    return sorted(used.union(accent, [reference] if reference else [], *(stage.get("models", []) for stage in stages)))


def bundled_models(config: dict[str, Any]) -> list[str]:
    """Those of the models that come with this project."""
    return [name for name in models_used(config) if bundled(config["models"][name]["path"])]


def word_codebooks(config: dict[str, Any]) -> int | None:
    """At how many codebooks the codec's own word errors say whether words can be judged: those of steering, else of the
    importance maps, else of the packed codec, else the most that the codec is heard at."""
    for stage in ("steering", "importance", "quantisation"):
        if config[stage]:
            return config[stage]["codebooks"]
    return max(config["codec"]["codebooks"]) if config["codec"] else None


def training_record(config: dict[str, Any], model: str) -> str:
    """The file in a model's folder that says which voices it heard in its own training, whether or not it is there."""
    return str(Path(config["models"][model]["path"]) / "training.json")


def voice_records(config: dict[str, Any], targets: list[str]) -> dict[str, str]:
    """target -> `training_record`, where that names speakers of this corpus.

    A bundled model's names those of the bundled corpus; LibriSpeech has a reader 103 too.
    """
    found = {}
    for target in targets:
        name, heard = parse_target(target)[0], {"data": corpus_config(config, corpus_of(target))}
        if bundled_speech(heard) or not bundled(config["models"][name]["path"]):
            found[target] = training_record(config, name)
    return found


def bundled_speech(config: dict[str, Any]) -> bool:
    """Whether the speech is the synthetic corpus that comes with this project."""
    data = config["data"]
    return data["source"] != "librispeech" and bool(data.get("path")) and bundled(data["path"])
