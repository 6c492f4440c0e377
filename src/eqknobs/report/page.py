"""One page that shows, plays and qualifies the results of a run; it opens from disk without a network.

What a stage shows is told by its own module; here are the frame, the players and the files.
"""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from eqknobs.errors import EqknobsError, counted
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context, SectionModule
from eqknobs.io import atomic_path
from eqknobs.report import players
from eqknobs.stages.codec import section as codec
from eqknobs.stages.importance import section as importance
from eqknobs.stages.probes import section as probes
from eqknobs.stages.saes import section as saes
from eqknobs.stages.speech_lm import section as speech_lm
from eqknobs.stages.steering import section as steering

SECTIONS: tuple[SectionModule, ...] = (codec, saes, probes, steering, importance, speech_lm)  # in the order of the page

HERE = Path(__file__).parent
MAX_PAGE = 25e6  # bytes
PACKAGES = "eqknobs torch transformers snakemake scikit-learn librosa faster-whisper resemblyzer torchcrepe".split()

PUBLISHED_SOURCE = (
    "kyutai's Mimi on LibriSpeech. Version 1: the blog post “Finding EQ Knobs Inside a Neural Audio Codec with Sparse "
    "Autoencoders”; rerun: its author's controlled rerun of August 2026."
)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _bundled_models(inputs: Inputs, cfg: dict[str, Any], speakers: set[str]) -> list[dict[str, Any]]:
    """[{name, heard, speech}] of the models that come with this project: which of the speakers each heard in its
    training, and that speech in words. Its training.json names speakers of the bundled corpus: of another corpus it
    says nothing."""
    found = []
    for name, record in cfg["training"].items():
        training = inputs.json(record) if inputs.has(record) else {}
        heard = sorted({str(who) for who in training.get("voices_heard") or []} & speakers)
        speech = training.get("config", {}).get("description", "")
        found.append({"name": name, "heard": heard if cfg["bundled_speech"] else [], "speech": speech})
    return found


def _contexts(inputs: Inputs, cfg: dict[str, Any], facts: dict[str, Any], target: str) -> dict[str, Context]:
    """stage -> where its section of a target is made, for the stages that work on the target."""
    found = {stage: own for stage, own in cfg["stages"].items() if target in own["targets"]}
    return {stage: Context(target, inputs, cfg, own, facts) for stage, own in found.items()}


def _listening(
    inputs: Inputs, cfg: dict[str, Any], contexts: dict[str, dict[str, Context]], out_dir: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], list[dict[str, Any]]]:
    """(players of each target, media, copied files)."""
    played, clips, sounding = {}, {}, []
    for target, at in contexts.items():
        shown = [section for section in SECTIONS if section.STAGE in at]
        stages = [section.STAGE for section in shown if section.SOUNDS]
        sounding += [(target, stage) for stage in stages]
        for section in shown:
            if hasattr(section, "played"):
                what = section.played(at[section.STAGE])
                played[target] = players.Played(inputs, target, section.STAGE, what)
        if stages:
            index = played[target].index if target in played else inputs.csv(f"renders/{target}/{stages[0]}/index.csv")
            clips[target] = players.most_rendered(index, cfg["config"]["report"]["clips"])
    stops = sum(found.stops(clips[target]) for target, found in played.items())
    seconds, media = players.SOUND_BUDGET / players.MP3_BYTES / max(stops, 1), players.Media()
    made = {
        target: [played[target].player(clip, seconds, media) for clip in clips[target]] if target in played else []
        for target in contexts
    }
    return made, media.items, players.copy_sounds(inputs, sounding, clips, out_dir)


def _shown(environment: jinja2.Environment, contexts: dict[str, Context], about: dict[str, Any]) -> dict[str, str]:
    """stage -> the HTML of its section of one target."""
    return {
        section.STAGE: environment.get_template(f"{section.STAGE}/section.html.j2").render(
            **section.show(contexts[section.STAGE]), published=section.PUBLISHED, codec="codec" in contexts, **about
        )
        for section in SECTIONS
        if section.STAGE in contexts
    }


def write_report(inputs: Inputs, cfg: dict[str, Any], out_dir: str | Path) -> None:
    """Write `out_dir/index.html` (self-contained) and `out_dir/audio/` (lossless sound files it links to).

    cfg: `config` (the whole configuration), `targets` and `stages` as in `write_tables`, `training` (bundled model ->
    its training.json), `bundled_speech` (whether that names speakers of this corpus). Raises EqknobsError if the page
    would be larger than 25 MB.
    """
    out_dir, config = Path(out_dir), cfg["config"]
    targets = cfg["targets"]
    summary = inputs.json("tables/summary.json")["targets"]
    contexts = {target: _contexts(inputs, cfg, summary[target], target) for target in targets}
    made, media, files = _listening(inputs, cfg, contexts, out_dir)
    manifest = inputs.csv("manifest/manifest.csv")
    corpus = manifest.groupby("split").agg(clips=("id", "size"), speakers=("speaker", "nunique"), s=("seconds", "sum"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, HERE.parent / "stages"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    bundled = _bundled_models(inputs, cfg, set(manifest["speaker"]))
    about = {"published_source": PUBLISHED_SOURCE, "bundled_models": bundled}
    used = {target.partition(".")[0] for target in targets}
    page = environment.get_template("page.html.j2").render(
        **about,
        run=config["run"]["name"],
        cfg=config,
        models={name: model for name, model in config["models"].items() if name in used},
        config_text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
        targets=[
            {"name": name, "facts": summary[name], "players": made[name], "html": _shown(environment, at, about)}
            for name, at in contexts.items()
        ],
        sections=[section for section in SECTIONS if any(section.STAGE in at for at in contexts.values())],
        corpus=corpus.reset_index().to_dict("records"),
        rejected=len(inputs.csv("manifest/rejected.csv")),
        bundled_speech=cfg["bundled_speech"],
        counted=counted,
        versions=_versions(),
        files=files,
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        players=_script_json(made),
        media=_script_json(media),
    )
    if len(page.encode()) > MAX_PAGE:
        raise EqknobsError(f"report: the page has {len(page.encode()) / 1e6:.0f} MB, more than 25; lower report.clips")
    with atomic_path(out_dir / "index.html") as path:
        path.write_text(page, encoding="utf-8")


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
