"""What a run will take, before anything starts: jobs, disk, memory and hours a stage, from measurements.

`benchmarks/results/full_size.csv` (`tools/rehearse.py`) has what each stage took on a few clips at full size, and how
much `work` that was. Work is counted here, from a configuration alone; time and disk are taken to grow with it in
proportion, on top of a fixed cost a job (Python and its imports: what the quickest one takes), memory not to grow.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv
from eqknobs.plan import SPEECH, corpus_config, models_used

MEASURED = Path("benchmarks/results/full_size.csv")
CLIP_SECONDS = 12.3  # mean length of LibriSpeech's utterances; shorter corpora are overestimated
ASSUMPTIONS = (
    "a job's imports cost what the quickest job took; above that, time and disk grow in proportion to a stage's work "
    "(clips, seconds of sound, epochs, features), memory does not; where a part does not grow (a ridge of all "
    "features), hours are an upper bound",
    f"a clip lasts {CLIP_SECONDS} s (LibriSpeech's mean), all together max_minutes at most",
    "one job at a time with one thread, on the machine that was measured; nothing is known of a GPU's speed",
)
# Stages that do not tell what a job costs before it works: these import no model, or one job works for all.
NO_START = ("manifest", "tables", "report", "activations", "talk")
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """How much a stage has to do.

    unit: what is counted; amount: of all its jobs, from configuration, seconds of sound and number of jobs; disk: what
    that which it leaves on the disk grows with: the work, the jobs, or the sound that each job hears.
    """

    unit: str
    amount: Callable[[Config, float, int], float]
    disk: str = "work"  # or jobs, sound


def _saes(config: Config) -> list[dict[str, Any]]:
    return [sae for sae in (config["saes"] or {}).values() if sae]


def _epochs(config: Config, grid: bool = False) -> float:
    """Features times epochs, a mean over SAEs; grid: of those with one, all their points."""
    saes = [sae for sae in _saes(config) if "grid" in sae or not grid]
    points = [max(map(len, sae["grid"].values())) if grid else 1 for sae in saes]
    found = [count * sae["d_sae"] * sae["epochs"] for count, sae in zip(points, saes, strict=True)]
    return sum(found) / max(1, len(found))


def _features(config: Config) -> float:
    return sum(sae["d_sae"] for sae in _saes(config))


def _of(config: Config, stage: str, key: str, default: float = 0) -> Any:
    return (config.get(stage) or {}).get(key, default)


def _judged(config: Config) -> float:
    """Sounds that are judged, about: clips of the stages that render, times their conditions."""
    codec, steering, importance, packed = (
        config.get(s) or {} for s in ("codec", "steering", "importance", "quantisation")
    )
    found = codec.get("clips", 0) * (2 + len(codec.get("codebooks", ())))
    found += steering.get("clips", 0) * len(steering.get("alphas", ())) * len(steering.get("saes", (1, 2)))
    found += importance.get("clips", 0) * (6 + importance.get("word_random_sets", 0))
    heard = len(packed.get("heard_widths", ())) + 4 * len(packed.get("heard_budgets", ()))
    return found + packed.get("heard_clips", 0) * heard * len(packed.get("heard_parts", (1, 2)))


def _pages(config: Config) -> float:
    section = config.get("features") or {}
    return (section.get("count", 0) + section.get("random", 0)) * section.get("clips", 0)


WORK = {
    "manifest": Work("jobs", lambda config, audio, jobs: jobs),
    # One pass over a corpus for all targets of a model.
    "activations": Work("s of sound", lambda c, audio, jobs: audio * jobs / len(c["run"]["targets"]), disk="sound"),
    "labels": Work("s of sound", lambda config, audio, jobs: audio * jobs),
    "sae": Work("s of sound x features x epochs", lambda c, audio, jobs: audio * jobs * _epochs(c), disk="jobs"),
    "sae_grid": Work(
        "s of sound x features x epochs", lambda c, audio, jobs: audio * jobs * _epochs(c, True), disk="jobs"
    ),
    "sae_scores": Work("s of sound x features", lambda c, audio, jobs: audio * jobs * _features(c), disk="jobs"),
    "stability": Work(
        "s of sound x shifts",
        lambda c, audio, jobs: audio * jobs * (1 + _of(c, "stability", "shifts", 1)),
        disk="jobs",
    ),
    "domains": Work(
        "permutations", lambda c, audio, jobs: jobs * (50 + _of(c, "domains", "permutations")), disk="jobs"
    ),
    "probes": Work(
        "s of sound x epochs", lambda c, audio, jobs: audio * jobs * _of(c, "probes", "epochs"), disk="jobs"
    ),
    "sae_probes": Work(
        "s of sound x epochs", lambda c, audio, jobs: audio * jobs * _of(c, "probes", "epochs"), disk="jobs"
    ),
    "label_search": Work(
        "frames x searches",
        lambda c, audio, jobs: jobs * _of(c, "label_search", "frames") * (1 + _of(c, "label_search", "shuffles")),
        disk="jobs",
    ),
    "features": Work("clips on pages", lambda c, audio, jobs: jobs * _pages(c)),
    "splicing": Work("clips", lambda c, audio, jobs: jobs * _of(c, "splicing", "clips"), disk="jobs"),
    "originals": Work("clips", lambda c, audio, jobs: jobs * max(1, _of(c, "codec", "clips")), disk="jobs"),
    "codec_renders": Work("clips", lambda c, audio, jobs: jobs * _of(c, "codec", "clips")),
    "steering_calibration": Work("clips", lambda c, audio, jobs: jobs * _of(c, "steering", "val_clips"), disk="jobs"),
    "steering_renders": Work(
        "clips x strengths", lambda c, audio, jobs: jobs * _of(c, "steering", "clips") * len(c["steering"]["alphas"])
    ),
    "importance_maps": Work(
        "clip seconds without one dimension",
        lambda c, audio, jobs: (
            jobs * _of(c, "importance", "oracle_clips") * min(_of(c, "importance", "segment_seconds", 1), CLIP_SECONDS)
        ),
        disk="jobs",
    ),
    "importance_renders": Work(
        "clips x sets",
        lambda c, audio, jobs: (
            jobs
            * _of(c, "importance", "clips")
            * (len(c["importance"]["removed"]) + 1)
            * (12 + _of(c, "importance", "random_sets"))
        ),
    ),
    "quantisation_plans": Work(
        "clip seconds x widths",
        lambda c, audio, jobs: (
            jobs
            * _of(c, "quantisation", "sensitivity_clips")
            * _of(c, "quantisation", "segment_seconds")
            * len(c["quantisation"]["widths"])
        ),
        disk="jobs",
    ),
    "quantisation_renders": Work(
        "clips x plans",
        lambda c, audio, jobs: (
            jobs
            * _of(c, "quantisation", "clips")
            * (
                len(c["quantisation"]["widths"])
                + len(c["quantisation"]["budgets"]) * (5 + _of(c, "quantisation", "random_plans"))
            )
        ),
    ),
    "judgements": Work("sounds", lambda c, audio, jobs: jobs * _judged(c), disk="jobs"),
    "tables": Work("bootstrap draws", lambda c, audio, jobs: jobs * c["tables"]["bootstrap"], disk="jobs"),
    "report": Work("jobs", lambda c, audio, jobs: jobs),
}


def sound_seconds(config: dict[str, Any], corpora: Iterable[str]) -> float:
    """Seconds of sound that corpora hold at most, at LibriSpeech's mean length of a clip; of a union, of all its
    parts."""
    total = 0.0
    for name in corpora:
        data = corpus_config(config, name)
        if data["source"] == "synthesis":
            total += len(data["accents"]) * len(data["variants"]) * data["count"] * CLIP_SECONDS
        elif "max_utterances" not in data:  # made of others
            total += sound_seconds(config, [data["of"]] if isinstance(data["of"], str) else data["of"])
        else:
            total += min(data["max_utterances"] * CLIP_SECONDS, 60 * data["max_minutes"])
    return total


def amount(config: Config, stage: str, audio: float, jobs: int) -> tuple[float, str]:
    """How much work a stage has in a run, and its unit; (jobs, "jobs") of stages that are not counted otherwise."""
    work = WORK.get(stage, WORK["report"])
    return float(work.amount(config, audio, jobs)), work.unit


@dataclass(frozen=True)
class Jobs:
    """What a dry run counts: jobs by stage, and the corpora that are heard."""

    by_stage: Mapping[str, int]
    corpora: tuple[str, ...]


def count_jobs(file: str | Path) -> Jobs:
    """Jobs of a whole run, as Snakemake counts them in a dry run from nothing; no network.

    Raises EqknobsError where it refuses the configuration, with its own reason, or no checkout is here.
    """
    if not Path("Snakefile").is_file():
        raise EqknobsError("no Snakefile here: run eqknobs plan in a checkout of the project")
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "--nolock", "--configfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise EqknobsError(f"{file}: {lines[-1] if lines else 'Snakemake refused it'}")
    return parse_jobs(done.stdout + done.stderr)


def parse_jobs(said: str) -> Jobs:
    """The table of jobs in what a dry run prints: a corpus beside the speech counts with it."""
    _, _, rest = said.partition("Job stats:")
    found: dict[str, int] = {}
    for name, count in re.findall(r"^(\w+) +(\d+)$", rest.partition("total")[0], re.M):
        stage = name.removeprefix("corpus_")
        if stage != "all" and not stage.endswith("_shard"):  # what these do is counted with the whole job
            found[stage] = found.get(stage, 0) + int(count)
    drawn = re.findall(r"Draw the manifest(?: of ([\w-]+))?$", said, re.M)  # the messages of rules/data.smk
    return Jobs(found, tuple(dict.fromkeys(sorted(name or SPEECH for name in drawn))))


def forecast(config: dict[str, Any], jobs: Jobs, measured: pd.DataFrame) -> pd.DataFrame:
    """One row a stage: stage, jobs, disk_gib, peak_memory_gib, hours; the last three NaN where nothing like it was
    measured.

    measured: full_size.csv. Of several rehearsals the one of the run's own model is taken, else one of its kind.
    """
    rows = _like(config, measured).set_index("stage")
    jobwise = rows["cpu_seconds"] / rows["jobs"]
    start = jobwise.drop([name for name in NO_START if name in jobwise]).min()  # NaN: of none
    audio = sound_seconds(config, jobs.corpora)
    found = []
    for stage, count in jobs.by_stage.items():
        record: dict[str, Any] = {"stage": stage, "jobs": count}
        if stage in rows.index:
            row = rows.loc[stage]
            more = amount(config, stage, audio, count)[0] / row["work"] if row["work"] else 0.0
            fixed = min(jobwise[stage], start) if start == start else 0.0
            busy = row["cpu_seconds"] - fixed * row["jobs"]
            share = count / row["jobs"]
            by = WORK.get(stage, WORK["report"]).disk
            grown = {"work": more, "jobs": share, "sound": share * audio / row["audio_seconds"]}[by]
            record["disk_gib"], record["peak_memory_gib"] = row["disk_gib"] * grown, row["peak_memory_gib"]
            record["hours"] = (fixed * count + busy * more) / 3600
        found.append(record)
    return pd.DataFrame(found, columns=["stage", "jobs", "disk_gib", "peak_memory_gib", "hours"])


def _like(config: dict[str, Any], measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of the rehearsal that is nearest to a run: of its first model by name, else of its kind."""
    own = [(name, config["models"][name]["kind"]) for name in models_used(config)]
    rows = measured[measured["measured_or_computed"] == "measured"]
    for column, values in (("model", [name for name, _ in own]), ("kind", [kind for _, kind in own])):
        for value in values:
            if len(like := rows[rows[column] == value]):
                return like[like["config"] == like["config"].iloc[0]]
    return rows.iloc[:0]


def lines(config: dict[str, Any], jobs: Jobs, measured: pd.DataFrame) -> list[str]:
    """The forecast as text."""
    rows = forecast(config, jobs, measured)
    like = _like(config, measured)
    head = f"{'stage':<22} {'jobs':>5} {'disk GiB':>9} {'memory GiB':>11} {'hours':>8}"
    text = [head, *(_line(row) for row in rows.to_dict("records"))]
    known = rows.dropna()
    total = {"stage": "total", "jobs": rows["jobs"].sum(), "disk_gib": known["disk_gib"].sum()}
    total |= {"peak_memory_gib": known["peak_memory_gib"].max(), "hours": known["hours"].sum()}
    text.append(_line(total) + (" (of stages that were measured)" if len(known) < len(rows) else ""))
    if len(like):
        row = like.iloc[0]
        text.append(f"computed from {row['model']}, measured on {row['device']}: {row['machine']}")
    else:
        text.append("no model of these kinds was measured: jobs only")
    return [*text, *(f"assumed: {line}" for line in ASSUMPTIONS)]


def _line(row: Mapping[str, Any]) -> str:
    cells = [
        f"{row[key]:>{width}.{digits}f}" for key, width, digits in (("disk_gib", 9, 2), ("peak_memory_gib", 11, 2))
    ]
    cells += [f"{row['hours']:>8.2f}"]
    cells = [cell.replace("nan", "  -") for cell in cells]
    return f"{row['stage']:<22} {int(row['jobs']):>5} {' '.join(cells)}"


def plan(file: str | Path, config: dict[str, Any], measurements: Path | None = None) -> list[str]:
    """What the run of a configuration file will take, as text. Raises EqknobsError: see `count_jobs`, no table."""
    measurements = measurements or MEASURED
    if not measurements.is_file():
        raise EqknobsError(f"{measurements}: no such table; run eqknobs plan in a checkout, or tools/rehearse.py first")
    return lines(config, count_jobs(file), read_csv(measurements))
