"""What of a run each stage works on: its targets and SAEs, read from the configuration alone."""

from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError

DECODING = ("mimi", "encodec", "dac")  # kinds that turn activations back into sound


def parse_target(target: str) -> tuple[str, str]:
    """Split "tiny-mimi.encoder_layer.2" into the model "tiny-mimi" and the site "encoder_layer.2"."""
    model, _, site = target.partition(".")
    return model, site


def model_config(config: dict[str, Any], target: str) -> dict[str, Any]:
    """What `eqknobs.models.load_model` takes, for the model of a target; the device is added when the job runs."""
    name, _ = parse_target(target)
    return {"name": name, **config["models"][name]}


def decodes(config: dict[str, Any], target: str) -> bool:
    """Whether the target's model turns activations back into sound (a codec), so that it can be steered."""
    return config["models"][parse_target(target)[0]]["kind"] in DECODING


def stage_targets(config: dict[str, Any], stage: str, decoding: bool = False) -> list[str]:
    """The targets of the run that a stage works on; none where it is null.

    decoding: whether it makes sound, so that by default only targets that decode are its. Raises EqknobsError where
    `<stage>.targets` names one that the run has not, or that does not decode.
    """
    if not config.get(stage):
        return []
    wanted = config[stage].get("targets")
    for target in wanted or []:
        if target not in config["run"]["targets"]:
            raise EqknobsError(f"config: {stage}.targets: {target!r} is not under run.targets; add it there")
        if decoding and not decodes(config, target):
            raise EqknobsError(f"config: {stage}.targets: {target!r} is no codec: it makes no sound; leave it out")
    return [
        target
        for target in config["run"]["targets"]
        if (target in wanted if wanted else not decoding or decodes(config, target))
    ]


def trained_saes(config: dict[str, Any], target: str) -> list[str]:
    """The names of the SAEs that are trained on a target, sorted."""
    return sorted(name for name, sae in (config["saes"] or {}).items() if target in sae.get("targets", [target]))


def stage_saes(config: dict[str, Any], stage: str, target: str) -> list[str]:
    """Those of `trained_saes` that a stage reads: all, or the ones that `<stage>.saes` names."""
    trained = trained_saes(config, target)
    return [name for name in trained if name in config[stage].get("saes", trained)]


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


def bundled_speech(config: dict[str, Any]) -> bool:
    """Whether the speech is the synthetic corpus that comes with this project."""
    data = config["data"]
    return data["source"] != "librispeech" and bool(data.get("path")) and bundled(data["path"])
