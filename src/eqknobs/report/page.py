"""Pages that show, play and qualify the results of a run: an overview and one a stage; they open from disk without a
network.

What a stage shows is told by its own module; here are the frame, the players and the files.
"""

import json
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from eqknobs.errors import EqknobsError, counted
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context, Page, ReportCfg, SectionModule
from eqknobs.evidence.wording import ends, number
from eqknobs.io import atomic_path
from eqknobs.report import players
from eqknobs.report.findings import matrix, strongest, tally
from eqknobs.stages.accent import section as accent
from eqknobs.stages.codec import section as codec
from eqknobs.stages.domains import section as domains
from eqknobs.stages.erasing import section as erasing
from eqknobs.stages.features import section as features
from eqknobs.stages.hallucination import section as hallucination
from eqknobs.stages.importance import section as importance
from eqknobs.stages.label_search import section as label_search
from eqknobs.stages.lm_layers import section as lm_layers
from eqknobs.stages.lm_pruning import section as lm_pruning
from eqknobs.stages.lm_quantisation import section as lm_quantisation
from eqknobs.stages.lm_recipe import section as lm_recipe
from eqknobs.stages.lm_steering import section as lm_steering
from eqknobs.stages.phones import section as phones
from eqknobs.stages.probes import section as probes
from eqknobs.stages.quantisation import section as quantisation
from eqknobs.stages.saes import section as saes
from eqknobs.stages.speech_lm import section as speech_lm
from eqknobs.stages.stability import section as stability
from eqknobs.stages.steering import section as steering

SECTIONS: tuple[SectionModule, ...] = (
    codec,
    saes,
    stability,
    domains,
    probes,
    phones,
    label_search,
    erasing,
    features,
    hallucination,
    steering,
    importance,
    quantisation,
    accent,
    speech_lm,
    lm_layers,
    lm_pruning,
    lm_quantisation,
    lm_recipe,
    lm_steering,
)  # in the order of the pages

HERE = Path(__file__).parent
MAX_PAGE = 25e6  # bytes
CONFIG = "config.yaml"  # what made the run, for who looks into it later (`eqknobs.explore`)
# Kind of a model that comes with this project -> what it is, and the published one that it is not.
BUNDLED_KINDS = {"mimi": ("codec", "kyutai's Mimi"), "moshi": ("speech LM", "kyutai's Moshi")}
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


def _bundled_models(inputs: Inputs, cfg: ReportCfg, speakers: set[str]) -> list[dict[str, Any]]:
    """[{name, kind, known, heard, speech}] of the models that come with this project: what such a model is, and of
    which published one it is a small relative; which of the speakers it heard in its training, and that speech in
    words. Its training.json names speakers of the bundled corpus: of another corpus it says nothing."""
    found = []
    for name, record in cfg["training"].items():
        training = inputs.json(record) if inputs.has(record) else {}
        heard = sorted({str(who) for who in training.get("voices_heard") or []} & speakers)
        speech = training.get("config", {}).get("description", "")
        kind, known = BUNDLED_KINDS.get(cfg["config"]["models"][name]["kind"], ("model", "larger models"))
        heard = heard if cfg["bundled_speech"] else []
        found.append({"name": name, "kind": kind, "known": known, "heard": heard, "speech": speech})
    return found


def _corpora(inputs: Inputs, cfg: ReportCfg) -> list[dict[str, Any]]:
    """[{name, splits, synthetic, description}] of the corpora of the run; what its `corpus.json` says of each."""
    found = []
    for name, files in cfg["corpora"].items():
        clips = inputs.csv(files["manifest"])
        splits = clips.groupby("split").agg(clips=("id", "size"), speakers=("speaker", "nunique"), s=("seconds", "sum"))
        order = [split for split in ("train", "val", "test") if split in splits.index]
        splits = splits.loc[order + [split for split in splits.index if split not in order]]
        facts = inputs.json(files["facts"]) if files["facts"] and inputs.has(files["facts"]) else {}
        said = {"synthetic": bool(facts.get("synthetic")), "description": facts.get("description", "")}
        found.append({"name": name, "splits": splits.reset_index().to_dict("records"), **said})
    return found


def _contexts(inputs: Inputs, cfg: ReportCfg, facts: dict[str, Any], target: str) -> dict[str, Context]:
    """stage -> where its section of a target is made, for the stages that work on the target."""
    found = {stage: own for stage, own in cfg["stages"].items() if target in own["targets"]}
    return {stage: Context(target, inputs, cfg, own, facts) for stage, own in found.items()}


def _listening(
    inputs: Inputs, cfg: ReportCfg, contexts: dict[str, dict[str, Context]], out_dir: Path
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
            **section.show(contexts[section.STAGE]),
            published=section.PUBLISHED,
            codec="codec" in contexts,
            **about | {"published_source": getattr(section, "PUBLISHED_SOURCE", PUBLISHED_SOURCE)},
        )
        for section in SECTIONS
        if section.STAGE in contexts
    }


def _shows(sections: Sequence[SectionModule], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """[{stage, title, about, plays, tally}]: what the navigation and the overview say of the pages."""
    return [
        {
            "stage": section.STAGE,
            "title": section.TITLE,
            "about": getattr(section, "ABOUT", ""),
            "plays": hasattr(section, "played"),
            "tally": tally(line for own in facts.values() for line in _lines(own, section.STAGE)),
        }
        for section in sections
    ]


def _lines(facts: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return [line for line in facts["headlines"] if line["stage"] == stage]


def _playing(made: dict[str, list[dict[str, Any]]], media: dict[str, str]) -> dict[str, Any]:
    """What a page with these players embeds, for its script: the players, and the sounds and pictures of them only."""
    stops = [
        stop
        for players in made.values()
        for player in players
        for stop in (
            *player["references"].values(),
            *(stop for group in player["groups"] for arm in group["arms"] for stop in arm["stops"]),
        )
    ]
    used = dict.fromkeys(key for stop in stops for key in (stop["sound"], stop["picture"]))
    return {
        "made": made,
        "players": _script_json(made),
        "media": _script_json({key: media[key] for key in used}),
    }


def environment() -> jinja2.Environment:
    """Where the pages' templates are: of the report and of the stages."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, HERE.parent / "stages"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def frame_of(run: str) -> dict[str, Any]:
    """What every page is given: the run's name, style and script, and helpers of wording."""
    return {
        "run": run,
        "style": (HERE / "page.css").read_text(),
        "script": (HERE / "page.js").read_text(),
        "counted": counted,
        "number": number,
        "ends": ends,
    }


def write_report(inputs: Inputs, cfg: ReportCfg, out_dir: str | Path) -> None:
    """Write `out_dir/index.html`, a page a stage beside it (`<stage>.html`), those that sections add, `out_dir/audio/`
    and `out_dir/config.yaml`.

    The pages are self-contained but for links to one another and to the lossless sounds in `audio/`.
    Raises EqknobsError if a page would be larger than 25 MB.
    """
    out_dir, config, targets = Path(out_dir), cfg["config"], cfg["targets"]
    summary = inputs.json("tables/summary.json")["targets"]
    contexts = {target: _contexts(inputs, cfg, summary[target], target) for target in targets}
    made, media, files = _listening(inputs, cfg, contexts, out_dir)
    speakers = set(inputs.csv("manifest/manifest.csv")["speaker"])
    about = {
        "published_source": PUBLISHED_SOURCE,
        "bundled_models": _bundled_models(inputs, cfg, speakers),
        **frame_of(config["run"]["name"]),
    }
    templates = environment()
    html = {target: _shown(templates, at, about) for target, at in contexts.items()}
    sections = [section for section in SECTIONS if any(section.STAGE in at for at in contexts.values())]
    frame = {
        **about,
        "pages": _shows(sections, summary),
        "several": len(targets) > 1,
    }
    for section in sections:
        stage = section.STAGE
        played = made if hasattr(section, "played") else {}
        on_page = [
            {"name": name, "matrix": matrix(_lines(summary[name], stage)), "html": parts[stage]}
            for name, parts in html.items()
            if stage in parts
        ]
        page = templates.get_template("page.stage.html.j2").render(
            **frame,
            here=stage,
            title=section.TITLE,
            targets=on_page,
            playing=_playing({name: played[name] for name in played if stage in contexts[name]}, media),
            files=[group for group in files if group["stage"] == stage],
        )
        _write(out_dir / f"{stage}.html", page)
        _write_more(templates, section, [at[stage] for at in contexts.values() if stage in at], frame, out_dir)
    _write(out_dir / "index.html", _overview(templates, inputs, cfg, frame, _playing(_first(made), media)))
    with atomic_path(out_dir / CONFIG) as unfinished:
        unfinished.write_text(_config_text(config), encoding="utf-8")


def _write_more(
    environment: jinja2.Environment, section: SectionModule, at: list[Context], frame: dict[str, Any], out_dir: Path
) -> None:
    """The pages that a section adds to its own."""
    pages: Callable[[Context], list[Page]] = getattr(section, "pages", lambda _at: [])
    for context in at:
        for page in pages(context):
            shown = {**frame, "here": section.STAGE, "title": page.title, "playing": _playing({}, {}), **page.shown}
            _write(out_dir / page.file, environment.get_template(page.template).render(**shown), section.STAGE)


def _first(made: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Of all players the first one."""
    return next(({target: players[:1]} for target, players in made.items() if players), {})


def _overview(
    environment: jinja2.Environment, inputs: Inputs, cfg: ReportCfg, frame: dict[str, Any], playing: dict[str, Any]
) -> str:
    config, targets = cfg["config"], cfg["targets"]
    summary = inputs.json("tables/summary.json")["targets"]
    stages = [page["stage"] for page in frame["pages"]]
    lines = [
        {**line, "target": target} for target in targets for stage in stages for line in _lines(summary[target], stage)
    ]
    opened: dict[str, list[str]] = {}
    for target in targets:
        model, _, site = target.partition(".")
        opened.setdefault(model, []).extend([site] if site else [])
    return environment.get_template("page.index.html.j2").render(
        **frame,
        here="index",
        cfg=config,
        models={name: {**config["models"][name], "sites": sites} for name, sites in opened.items()},
        config_text=_config_text(config),
        findings=strongest(lines),
        tally=tally(lines),
        corpora=_corpora(inputs, cfg),
        rejected=len(inputs.csv("manifest/rejected.csv")),
        versions=_versions(),
        playing=playing,
    )


def _write(path: Path, page: str, stage: str = "report") -> None:
    size = len(page.encode())
    if size > MAX_PAGE:
        raise EqknobsError(f"report: {path.name} has {size / 1e6:.0f} MB, more than 25; lower {stage}.clips")
    with atomic_path(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _config_text(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
