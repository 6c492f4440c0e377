"""Rehearse the shipped configurations of real models at full size, with random weights: all but the meaning.

    .venv/bin/python tools/rehearse.py --work rehearsal mimi whisper-small hubert-base encodec dac
    .venv/bin/python tools/rehearse.py --work rehearsal moshiko           # 15.4 GB of disk, 12 GB of memory
    .venv/bin/python tools/rehearse.py --work rehearsal --write moshiko   # the checkpoint only
    .venv/bin/python tools/rehearse.py --work rehearsal --compute         # full counts, from what was measured

Writes seeded random checkpoints in the hub's formats below --work, piece by piece where they are large, then runs the
shipped configuration on a few clips of the bundled corpus, one job at a time: paths, counts and the number of layers
are lowered, everything else is as shipped. Of every stage the table says the peak memory (anonymous, and with the pages
of files), what it left on the disk, and its seconds, by the clock and of CPU (with one thread the
same on a quiet machine); `eqknobs plan` reads that. A case's rows replace those of its
earlier rehearsal.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from eqknobs.config import merge, read_config  # noqa: E402
from eqknobs.errors import EqknobsError, one_line_errors  # noqa: E402
from eqknobs.forecast import amount, count_jobs, forecast, sound_seconds  # noqa: E402
from eqknobs.io import (  # noqa: E402
    atomic_path,
    output_file,
    output_folder,
    read_csv,
    read_json,
    require_free_disk,
    write_csv,
    write_json,
)
from eqknobs.models.moshi.config import MoshiConfig, raw_config  # noqa: E402
from eqknobs.models.moshi.memory import SEVEN_B  # noqa: E402
from eqknobs.strict_yaml import read_yaml  # noqa: E402

GIB = 1 << 30
RECORDS = "jobs.json"  # of a rehearsal's folder
PIECE = 1 << 22  # values drawn at once
COLUMNS = (
    "config model kind stage clips jobs audio_seconds work unit peak_memory_gib peak_anonymous_gib disk_gib seconds "
    "cpu_seconds device machine measured_or_computed"
).split()
PARTS = ("rules", "workflow", "src", "config", "profiles", "envs")
# What a count becomes, wherever it stands; the shipped value where that is smaller.
FEW = {
    "clips": 2,
    "train": 8,  # of `hallucination`; shares of a split are smaller
    "val": 2,
    "test": 2,
    "val_clips": 2,
    "gradient_clips": 2,
    "oracle_clips": 1,
    "sensitivity_clips": 1,
    "heard_clips": 1,
    "map_clips": 4,
    "epochs": 2,
    "count": 4,
    "random": 2,
    "random_sets": 2,
    "word_random_sets": 1,
    "random_plans": 1,
    "heard_random": 1,
    "segment_seconds": 0.5,
    "permutations": 99,
    "resamples": 20,
    "shuffles": 2,
    "shifts": 1,
    "map_features": 100,
    "bootstrap": 100,
    "frames": 400,
    "held_out": 2,
    "calibration": 2,
    "listen": 1,
    "draws": 1,
}


@dataclass(frozen=True)
class Case:
    """A shipped configuration and a model of its size.

    targets: those of the run; goals: what Snakemake is asked for (nothing: all); change: further changes of the
    configuration; talk: seconds of one spoken answer.
    """

    config: str
    model: str
    kind: str
    write: Callable[[Path, int], None]
    targets: tuple[str, ...]
    clips: int
    goals: tuple[str, ...] = ()
    change: Mapping[str, Any] = field(default_factory=dict)
    talk: float = 0


# ---------------------------------------------------------------- checkpoints


def write_moshi(folder: Path, seed: int, config: MoshiConfig = SEVEN_B, dep_q: int = 8) -> None:
    """A Moshi in kyutai's format, one bfloat16 file; with 16 steps in the depformer a PersonaPlex."""
    from helpers.moshi_world import TOKENIZER, hub_layout, write_tokenizer

    layout = list(hub_layout(config, dep_q))
    size = 2 * sum(math.prod(shape) for _, shape, _, _ in layout)
    require_free_disk(folder, size, "free some, or give --work a folder on another disk")
    folder.mkdir(parents=True, exist_ok=True)
    write_streamed(folder / "model.safetensors", layout, seed)
    names = {"moshi_name": "model.safetensors", "tokenizer_name": TOKENIZER, "model_type": "moshi"}
    persona = {"model_type": "personaplex", "version": "7b-v1"}
    (folder / "config.json").write_text(json.dumps(persona if dep_q > 8 else raw_config(config) | names))
    write_tokenizer(folder / TOKENIZER)


def write_streamed(path: Path, layout: list[tuple[str, tuple[int, ...], float, float]], seed: int) -> None:
    """A safetensors file of bfloat16 normal values, by name, shape, mean and deviation; a few megabytes of memory."""
    header, end = {}, 0
    for name, shape, _, _ in layout:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (_, shape, mean, scale) in enumerate(layout):
            rng = np.random.Generator(np.random.SFC64([seed, number]))
            left = math.prod(shape)
            while left:
                values = rng.standard_normal(min(left, PIECE), dtype=np.float32)
                values *= np.float32(scale)
                values += np.float32(mean)
                bits = values.view(np.uint32)
                bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest bfloat16
                file.write((bits >> 16).astype(np.uint16).tobytes())
                left -= len(values)


def _save(net: Any, folder: Path, seed: int) -> None:
    """A network of transformers, its codebooks drawn too, which training would have filled."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if name.endswith(("codebook.embed", "codebook.embed_sum")):
            value.copy_(torch.randn(value.shape, generator=generator))
    net.save_pretrained(folder)


def write_mimi(folder: Path, seed: int) -> None:
    """kyutai/mimi: 96 M parameters."""
    import torch
    from transformers import EncodecFeatureExtractor, MimiConfig, MimiModel

    torch.manual_seed(seed)
    _save(MimiModel(MimiConfig()), folder, seed)
    EncodecFeatureExtractor(sampling_rate=24000).save_pretrained(folder)


def write_encodec(folder: Path, seed: int) -> None:
    """facebook/encodec_24khz."""
    import torch
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(seed)
    _save(EncodecModel(EncodecConfig()), folder, seed)


def write_dac(folder: Path, seed: int) -> None:
    """descript/dac_24khz."""
    import torch
    from transformers import DacConfig, DacModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"sampling_rate": 24000, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32}
    _save(DacModel(DacConfig(**sizes)), folder, seed)


def write_hubert(folder: Path, seed: int) -> None:
    """facebook/hubert-base-ls960."""
    import torch
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(seed)
    _save(HubertModel(HubertConfig()), folder, seed)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def write_whisper(folder: Path, seed: int) -> None:
    """openai/whisper-small, with the tokeniser (and 51,864 tokens) of the tiny.en that the recogniser brings along."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from eqknobs.models.ctranslate2 import convert_whisper
    from eqknobs.models.packaged import PACKAGED, package_files

    with tempfile.TemporaryDirectory() as scratch:
        parts = package_files("whisper-tiny.en")
        tiny = Path(scratch) / "tiny"
        convert_whisper(parts, parts[-1].parent, tiny, PACKAGED["whisper-tiny.en"].sha256)
        sizes = {"d_model": 768, "vocab_size": WhisperConfig.from_pretrained(tiny).vocab_size}
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_layers": 12, f"{part}_attention_heads": 12, f"{part}_ffn_dim": 3072}
        torch.manual_seed(seed)
        _save(WhisperForConditionalGeneration(WhisperConfig(**sizes)), folder, seed)
        for file in tiny.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                shutil.copyfile(file, folder / file.name)


def _persona(folder: Path, seed: int) -> None:
    write_moshi(folder, seed, dep_q=16)


AUDIOSAE = {"sae_seeds": [0, 1]}
CODEC = {"report": {"clips": 1}, "saes": {"topk": {"grid": {"k": [16, 32]}}}}
CACHES = ("caches",)
CASES = {
    "mimi": Case("librispeech-mimi", "mimi", "mimi", write_mimi, ("mimi.encoder_transformer",), 24, change=CODEC),
    "encodec": Case("librispeech-mimi", "encodec", "encodec", write_encodec, ("encodec.encoder",), 24, change=CODEC),
    "dac": Case("librispeech-mimi", "dac", "dac", write_dac, ("dac.encoder",), 24, change=CODEC),
    "whisper-small": Case(
        "audiosae-whisper",
        "whisper-small",
        "whisper",
        write_whisper,
        ("whisper-small.layer.7", "whisper-small.layer.11"),
        24,
        change=AUDIOSAE,
    ),
    "hubert-base": Case(
        "audiosae-hubert",
        "hubert-base",
        "hubert",
        write_hubert,
        ("hubert-base.layer.10", "hubert-base.layer.11"),
        24,
        change=AUDIOSAE,
    ),
    "moshiko": Case(
        "moshiko", "moshiko", "moshi", write_moshi, ("moshiko.residual.15", "moshiko.heads.15"), 12, CACHES, talk=0.4
    ),
    "personaplex": Case(
        "personaplex", "personaplex", "moshi", _persona, ("personaplex.residual.15", "personaplex.heads.15"), 12, CACHES
    ),
}


# ---------------------------------------------------------------- configuration


def few(section: Any) -> Any:
    """A section of a configuration with its counts lowered."""
    if not isinstance(section, dict):
        return section
    return {
        key: min(value, FEW[key]) if key in FEW and isinstance(value, int | float) else few(value)
        for key, value in section.items()
    }


def rehearsed(case: Case, shipped: dict[str, Any], models: Path, threads: int) -> dict[str, Any]:
    """The configuration of a rehearsal: the shipped one with paths, counts and targets of its own."""
    config = few(merge(read_yaml(ROOT / "config/config.yaml"), shipped))
    config["run"] = config["run"] | {"name": case.model, "targets": list(case.targets)}
    speech: dict[str, Any] = {"source": "folder", "path": str(ROOT / "resources/corpus"), "subset": None}
    speech |= {"labels": str(ROOT / "resources/corpus/labels.csv"), "min_seconds": 1.0}
    config["data"] |= speech | {"max_utterances": case.clips}
    for corpus in config.get("corpora", {}).values():
        if corpus["source"] == "librispeech":
            corpus |= speech
        if "max_utterances" in corpus:  # else made of others
            corpus["max_utterances"] = case.clips
    own = next(iter(shipped["models"].values()))
    model = {**own, "kind": case.kind, "path": str(models / case.model), "revision": None}
    if model["kind"] == "moshi":
        model |= {"codec": str(models / "mimi"), "codec_revision": None}
    config["models"] = {case.model: model}
    config["hardware"] = {**config.get("hardware", {}), "device": "cpu", "threads": threads}
    return merge(config, dict(case.change))


# ---------------------------------------------------------------- measuring


@dataclass
class Used:
    """What processes have used: bytes at most, anonymous and with pages of files, and seconds of CPU."""

    anonymous: int = 0
    total: int = 0
    cpu: float = 0.0


class Sampler:
    """What a process's descendants use, all together, sampled; `take` says it since the last call."""

    def __init__(self, root: int, every: float = 0.5):
        self.root, self.every = root, every
        self._used, self._lock, self._done = Used(), Lock(), Event()
        self._ticks: dict[int, int] = {}
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def take(self) -> Used:
        with self._lock:
            found, self._used = self._used, Used()
        return found

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            family = self._family()
            anonymous, total, cpu = 0, 0, 0.0
            for pid in family:
                with suppress(OSError, KeyError, ValueError):  # gone meanwhile
                    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    anonymous += int(lines["RssAnon"].split()[0]) << 10
                    total += int(lines["VmRSS"].split()[0]) << 10
                    ticks = sum(map(int, _fields(pid)[11:13]))  # user and system
                    cpu += (ticks - self._ticks.get(pid, 0)) / os.sysconf("SC_CLK_TCK")
                    self._ticks[pid] = ticks
            with self._lock:
                used = self._used
                self._used = Used(max(used.anonymous, anonymous), max(used.total, total), used.cpu + cpu)

    def _family(self) -> set[int]:
        parents: dict[int, int] = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                with suppress(OSError, IndexError):
                    parents[int(path.name)] = int(_fields(int(path.name))[1])
        family, new = set(), {self.root}
        while new:
            family |= new
            new = {pid for pid, parent in parents.items() if parent in new} - family
        return family - {self.root}


def _fields(pid: int) -> list[str]:
    """/proc/<pid>/stat after the name of the command: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder, hard links counted once."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            state = path.lstat()
            if S_ISREG(state.st_mode):
                found[state.st_ino] = state.st_size
    return sum(found.values())


@contextmanager
def measured(rows: list[dict[str, Any]], folder: Path, run: str, snakemake: int) -> Iterator[None]:
    """While the block runs, one record a job that ended: its rule, seconds, peaks, and what it left on the disk.
    snakemake: the process whose jobs they are, itself not counted.

    Jobs run one after another; the one whose time Snakemake has just written down is the one that was sampled.
    """
    times, done = folder / "results" / run / "benchmarks", Event()
    written = (folder / "results", folder / "work")
    with Sampler(snakemake) as sampler:

        def watch() -> None:
            seen = set(times.glob("*.tsv"))
            disk = sum(map(bytes_below, written))
            last = False
            while not last:
                last = done.wait(0.5)
                for path in sorted(set(times.glob("*.tsv")) - seen):
                    lines = path.read_text().splitlines()
                    if len(lines) < 2:
                        continue
                    seen.add(path)
                    used = sampler.take()
                    before, disk = disk, sum(map(bytes_below, written))
                    seconds = float(lines[1].split("\t")[0])
                    row = {"job": path.name, "stage": path.name.split(".")[0], "seconds": seconds}
                    rows.append(row | {"disk": disk - before} | vars(used))
                    write_json(folder / RECORDS, rows)

        thread = Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def run_workflow(
    case: Case, name: str, work: Path, models: Path, threads: int, resume: bool = False
) -> list[dict[str, Any]]:
    """Run a case in a folder of its own below `work`; records of its jobs, also of those before one that fails.

    resume: go on in the folder of an earlier, unfinished rehearsal, with the code that it began with.
    """
    folder = work / name
    rows: list[dict[str, Any]] = read_json(folder / RECORDS) if resume and (folder / RECORDS).is_file() else []
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "Snakefile").is_file():
        (folder / "resources").symlink_to(ROOT / "resources")
        for part in PARTS:  # copied: the checkout may be edited while hours of a rehearsal go by
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    shipped = read_yaml(ROOT / f"config/{case.config}.yaml")
    config = rehearsed(case, shipped, models, threads)
    (folder / "rehearsal.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *case.goals,
        "--cores",
        str(threads),
        "--nolock",  # nobody else works there, and a rehearsal that was killed leaves one
        "--configfile",
        "rehearsal.yaml",
    ]
    with (folder / "log").open("a") as log:
        done = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)
        with measured(rows, folder, case.model, done.pid):
            done.wait()
    if done.returncode:
        said = "\n".join((folder / "log").read_text().splitlines()[-40:])
        print(said, file=sys.stderr)
        print(f"{name}: ended with {done.returncode}; {folder}/log has it all", file=sys.stderr)
    speech = folder / "results" / case.model / "manifest/manifest.csv"
    heard = [read_csv(file)["seconds"].sum() for file in [speech, *speech.parent.glob("*/manifest.csv")]]
    facts = {"clips": len(read_csv(speech)), "audio_seconds": float(sum(heard))}
    counts = Counter(row["stage"] for row in rows)
    done_there = {stage: amount(config, stage, facts["audio_seconds"], count) for stage, count in counts.items()}
    return [row | facts | dict(zip(("work", "unit"), done_there[row["stage"]], strict=True)) for row in rows]


def environment(checkout: Path = ROOT) -> dict[str, str]:
    """Of what runs: the package of a checkout, no network."""
    return {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_talk(case: Case, work: Path, models: Path) -> dict[str, Any]:
    """One spoken answer of a Moshi to a bundled clip."""
    folder = work / f"{case.model}-talk"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["talk", "--model", models / case.model, "--codec", models / "mimi", "--nf4", "--device", "cpu"]
    clip = next((ROOT / "resources/corpus").glob("*/*/*.flac"))
    words += ["--audio", clip, "--seconds", case.talk, "--out", folder / "answer.wav"]
    code = "import sys; from eqknobs.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, words)]
    start = time.perf_counter()
    with Sampler(os.getpid()) as sampler:
        done = subprocess.run(command, cwd=folder, env=environment())
        used = sampler.take()
    if done.returncode:
        raise EqknobsError(f"eqknobs talk ended with {done.returncode}: it has said why")
    seconds = time.perf_counter() - start
    row = {"stage": "talk", "seconds": seconds, "disk": bytes_below(folder), "clips": 1, "audio_seconds": case.talk}
    return row | vars(used) | {"work": case.talk, "unit": "s of sound"}


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores, {memory:.0f} GiB"


def table(name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The records of a case's jobs as rows of full_size.csv, one a stage."""
    found = []
    for stage, jobs in pd.DataFrame(rows).groupby("stage", sort=False):
        sums = jobs[["seconds", "cpu", "disk"]].sum()
        found.append(
            {
                "config": CASES[name].config,
                "model": CASES[name].model,
                "kind": CASES[name].kind,
                "stage": stage,
                "clips": int(jobs["clips"].iloc[0]),
                "jobs": len(jobs),
                "audio_seconds": round(jobs["audio_seconds"].iloc[0], 1),
                "work": round(jobs["work"].iloc[0], 1),
                "unit": jobs["unit"].iloc[0],
                "peak_memory_gib": round(jobs["total"].max() / GIB, 3),
                "peak_anonymous_gib": round(jobs["anonymous"].max() / GIB, 3),
                "disk_gib": round(max(0.0, sums["disk"]) / GIB, 6),
                "seconds": round(sums["seconds"], 1),
                "cpu_seconds": round(sums["cpu"], 1),
                "device": "cpu",
                "machine": machine(),
                "measured_or_computed": "measured",
            }
        )
    return pd.DataFrame(found, columns=COLUMNS)


def put(path: Path, rows: pd.DataFrame) -> None:
    """Write a case's rows into the table, in place of its earlier ones; an answer, which is a command of its own, and
    the stages of a run replace only their like."""
    if path.is_file():
        old = read_csv(path)
        spoken, replaced = old["stage"] == "talk", set(rows["stage"] == "talk")
        gone = old["model"].isin(rows["model"]) & spoken.isin(replaced)
        gone &= old["measured_or_computed"] == "measured"
        rows = pd.concat([old[~gone], rows], ignore_index=True)
    write_csv(path, rows.sort_values(["config", "model"], kind="stable"))


def computed(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows of the shipped configurations at their full counts, computed from measured ones as `eqknobs plan` does."""
    found = []
    for case in CASES.values():
        file = ROOT / f"config/{case.config}.yaml"
        rows = measured[(measured["model"] == case.model) & (measured["measured_or_computed"] == "measured")]
        config = read_config(file)
        if not len(rows) or case.model not in config["run"]["targets"][0]:
            continue
        jobs = count_jobs(file)
        audio = sound_seconds(config, jobs.corpora)
        facts = {"config": case.config, "model": case.model, "kind": case.kind, "audio_seconds": round(audio, 1)}
        facts |= {"clips": config["data"]["max_utterances"], "measured_or_computed": "computed"}
        facts |= dict(rows.iloc[0][["device", "machine"]])
        for row in forecast(config, jobs, rows).dropna().to_dict("records"):
            work, unit = amount(config, row["stage"], audio, row["jobs"])
            seconds = round(3600 * row["hours"], 1)
            anonymous = rows.set_index("stage").loc[row["stage"], "peak_anonymous_gib"]
            sizes = {"peak_anonymous_gib": anonymous, "disk_gib": round(row["disk_gib"], 6)}
            sizes |= {"seconds": seconds, "cpu_seconds": seconds, "work": round(work, 1), "unit": unit}
            found.append(facts | row | sizes)
    return pd.DataFrame(found, columns=COLUMNS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--work", type=output_folder, required=True, help="checkpoints and runs, outside the checkout")
    parser.add_argument("--out", type=output_file, default=str(ROOT / "benchmarks/results/full_size.csv"))
    parser.add_argument("--clips", type=int, help="clips of speech, instead of the case's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the checkpoints, run nothing")
    parser.add_argument("--compute", action="store_true", help="run nothing; compute all rows at full counts anew")
    parser.add_argument("--resume", action="store_true", help="go on in the folder of an unfinished rehearsal")
    parser.add_argument("--goals", nargs="+", metavar="TARGET", help="of Snakemake, instead of the case's own")
    parser.add_argument("--only", choices=["run", "talk"], help="of the cases that also talk")
    args = parser.parse_args(arguments)
    work = args.work.resolve()
    models = work / "models"
    with one_line_errors():
        if unknown := sorted(set(args.cases) - set(CASES)):
            raise EqknobsError(f"{unknown[0]}: no such case; there are {', '.join(CASES)}")
        if args.compute:
            measured = read_csv(args.out)
            measured = measured[measured["measured_or_computed"] == "measured"]
            write_csv(args.out, pd.concat([measured, computed(measured)], ignore_index=True))
            return
        for name in args.cases:
            case = CASES[name] if args.clips is None else replace(CASES[name], clips=args.clips)
            for model in (name, *(["mimi"] if case.talk or case.goals else [])):
                if not (models / model / "config.json").is_file():
                    start = time.perf_counter()
                    CASES[model].write(models / model, args.seed)
                    size = bytes_below(models / model) / GIB
                    print(f"{model}: {size:.2f} GiB written in {time.perf_counter() - start:.0f} s", flush=True)
            if args.write:
                continue
            case = replace(case, goals=tuple(args.goals)) if args.goals else case
            rows = [] if args.only == "talk" else run_workflow(case, name, work, models, args.threads, args.resume)
            if case.talk and args.only != "run":
                rows.append(run_talk(case, work, models))
            if rows:
                found = table(name, rows)
                put(args.out, found)
                print(found.drop(columns=["config", "machine", "device"]).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
