"""Training steps of sparse autoencoders, ours beside other libraries': time, memory, and what they have learnt.

    bash benchmarks/make_peers_env.sh
    .venv-peers/bin/python benchmarks/sae_training.py

Everybody trains on the same activations, step by step in turn (A, B, C, A, …), so that whatever else the machine does
meets all alike; the median step is given as a multiple of the median of six dense products of the same shape, timed in
the same turns. One process per number of threads. See benchmarks/README.md for the columns. A peer that is not
installed is left out, with a line that says so.
"""

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import output_file
from sae_contestants import MODULES, Contestant, Task, family, installed_version, makers

HERE = Path(__file__).resolve().parent
COLUMNS = [
    "library",
    "version",
    "variant",
    "threads",
    "step_ms",
    "floor_ratio",
    "peak_memory_mb",
    "fvu",
    "l0",
    "machine",
]
EQUAL_TIME_COLUMNS = ["library", "variant", "seconds", "steps", "fvu", "l0"]
ALL_FAMILIES = ["topk", "topk+auxk", "batchtopk", "batchtopk+auxk", "jumprelu", "l1"]
TARGETS = {"topk": 0.45, "batchtopk": 0.45, "jumprelu": 1.05, "rms_l1": 1.05}  # × floor
AUXK_TARGET = 0.3  # × floor more than without
FLOOR = ("floor", "floor")
Key = tuple[str, str]  # library, variant


@dataclass
class Data:
    """Raw train frames [N, d], their mean and deviation [d], z-scored held-out frames [n, d]."""

    raw: Tensor
    mean: Tensor
    std: Tensor
    held_out: Tensor

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """The batch of that number, raw and z-scored [size, d]: one permutation of all frames after another."""
        per_epoch = len(self.raw) // size
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([1, epoch]).permutation(len(self.raw))
        raw = self.raw[torch.from_numpy(order[place * size : (place + 1) * size])]
        return raw, (raw - self.mean) / self.std


def planted(d: int, frames: int, held_out: int, seed: int = 0) -> Data:
    """Frames made of 2 d directions, on average 16 a frame and some rarer than others, plus 5 % noise; off centre and
    with unequal scales, as latents are."""
    generator = torch.Generator().manual_seed(seed)
    count, active = 2 * d, min(16, d // 4)
    directions = torch.randn(count, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chance = 1 / torch.arange(1, count + 1) ** 0.5
    chance *= active / chance.sum()
    blocks = []
    for start in range(0, frames + held_out, 8192):
        size = min(8192, frames + held_out - start)
        on = torch.rand(size, count, generator=generator) < chance
        strength = 0.5 + torch.empty(size, count).exponential_(generator=generator)
        blocks.append((on * strength) @ directions)
    clean = torch.cat(blocks)
    noisy = clean + 0.05**0.5 * clean.std() * torch.randn(clean.shape, generator=generator)
    scale = torch.empty(d).uniform_(0.5, 4, generator=generator)
    return _split(noisy * scale + torch.linspace(-5, 5, d), frames)


def cached(path: str, frames: int, held_out: int) -> Data:
    """Train frames of an activation cache, and of its val frames (test, if there are none) as many as wanted."""
    with ActivationCache(path) as cache:
        others = cache.rows("val") if len(cache.rows("val")) else cache.rows("test")
        picked = [
            rows[:: max(1, len(rows) // n)][:n] for rows, n in ((cache.rows("train"), frames), (others, held_out))
        ]
        raw = torch.from_numpy(np.concatenate([cache.acts[rows] for rows in picked]))
        data = _split(raw, len(picked[0]))
    return data


def _split(raw: Tensor, frames: int) -> Data:
    train = raw[:frames]
    mean, std = train.mean(0), train.std(0)
    return Data(train, mean, std, (raw[frames:] - mean) / std)


class Floor:
    """The six dense products that autograd does for z -> z W_encᵀ -> f W_dec, into memory that is there already."""

    def __init__(self, task: Task):
        generator = torch.Generator().manual_seed(0)
        self.w_enc, self.w_dec = (torch.randn(task.features, task.d, generator=generator) for _ in range(2))
        self.g = torch.randn(task.batch, task.d, generator=generator)
        self.f, self.to_f = torch.empty(task.batch, task.features), torch.empty(task.batch, task.features)
        self.out, self.to_z = torch.empty(task.batch, task.d), torch.empty(task.batch, task.d)
        self.to_enc, self.to_dec = torch.empty(task.features, task.d), torch.empty(task.features, task.d)

    def step(self, raw: Tensor, z: Tensor) -> None:
        torch.mm(z, self.w_enc.T, out=self.f)
        torch.mm(self.f, self.w_dec, out=self.out)
        torch.mm(self.g, self.w_dec.T, out=self.to_f)
        torch.mm(self.f.T, self.g, out=self.to_dec)
        torch.mm(self.to_f.T, z, out=self.to_enc)
        torch.mm(self.to_f, self.w_enc, out=self.to_z)

    def put_to_sleep(self) -> None:
        """Nothing here sleeps."""


# ---------------------------------------------------------------- what is measured


def time_steps(task: Task, data: Data, keys: list[Key], rounds: int, warm_up: int = 2) -> dict[Key, float]:
    """Median milliseconds of a step of each contestant and of the floor, over `rounds` turns after the warm-up ones.

    Each turn begins with another contestant: nobody always finds the cache as the same neighbour left it.
    """
    build = makers([key[0] for key in keys], ALL_FAMILIES)
    runners: dict[Key, Contestant | Floor] = {FLOOR: Floor(task)} | {key: build[key](task, data) for key in keys}
    names = list(runners)
    taken: dict[Key, list[float]] = {key: [] for key in names}
    gc.disable()
    for number in range(warm_up + rounds):
        raw, z = data.batch(number, task.batch)
        for key in names[number % len(names) :] + names[: number % len(names)]:
            runners[key].put_to_sleep()
            start = time.perf_counter()
            runners[key].step(raw, z)
            taken[key].append((time.perf_counter() - start) * 1000)
    gc.enable()
    for key, runner in runners.items():
        if isinstance(runner, Contestant) and runner.aux and runner.dead() < task.features // 2:
            raise RuntimeError(f"{key}: {runner.dead()} of {task.features} features are dead, half of them should be")
    return {key: median(times[warm_up:]) for key, times in taken.items()}


def memory(task: Task, data: Data, key: Key, steps: int = 2) -> float:
    """Most memory in MB (10^6 bytes) that a contestant's weights, optimiser and `steps` steps take beside the data.

    To be called in a process that has trained nothing before.
    """
    torch.set_num_threads(1)
    batches = [data.batch(number, task.batch) for number in range(steps)]
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before shall count when it is used again
    before, peak, done = _anonymous_bytes(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.001)

    watcher = Thread(target=watch)
    watcher.start()
    runner = makers([key[0]], ALL_FAMILIES)[key](task, data)
    for raw, z in batches:
        runner.put_to_sleep()
        runner.step(raw, z)
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def _anonymous_bytes() -> int:
    """Anonymous resident memory of this process: pages of shared libraries are nobody's doing."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


@torch.no_grad()
def score(runner: Contestant, held_out: Tensor, batch: int) -> tuple[float, float]:
    """(FVU, L0) on z-scored held-out frames, in blocks of a batch (BatchTopK chooses among a block)."""
    squared = active = 0.0
    for start in range(0, len(held_out), batch):
        z = held_out[start : start + batch]
        code = runner.code(z)
        squared += (z - runner.decode(code)).double().square().sum().item()
        active += (code > 0).sum().item()
    return squared / held_out.double().square().sum().item(), active / len(held_out)


def train(task: Task, data: Data, keys: list[Key], steps: int) -> list[dict[str, Any]]:
    """Train everybody for equally many steps, in turn, each on the same batches.

    Per contestant: fvu and l0 on held-out frames after all steps, and equal_time = seconds, steps, fvu, l0 when the
    time was over that the quickest of its family needs for all steps. The first step, where all set up, is not timed.
    """
    build = makers([key[0] for key in keys], ALL_FAMILIES)
    runners = {key: build[key](task, data) for key in keys}
    taken: dict[Key, list[float]] = {key: [] for key in keys}
    budget: dict[str, float] = {}
    at_time: dict[Key, dict[str, float]] = {}
    probe = max(2, steps // 10)  # steps from which the quickest is told; the slowest peers take a tenth of its pace
    for number in range(steps):
        raw, z = data.batch(number, task.batch)
        for key, runner in runners.items():
            start = time.perf_counter()
            runner.step(raw, z)
            if number:
                taken[key].append(time.perf_counter() - start)
        if number + 1 == probe:
            for key, times in taken.items():
                name = family(key[1])
                budget[name] = min(budget.get(name, np.inf), median(times or [0.0]) * (steps - 1))
        for key, runner in runners.items():
            over = number + 1 >= probe and sum(taken[key]) >= budget[family(key[1])]
            if key not in at_time and (over or number + 1 == steps):
                fvu, l0 = score(runner, data.held_out, task.batch)
                at_time[key] = {"seconds": sum(taken[key]), "steps": number + 1, "fvu": fvu, "l0": l0}
    found = []
    for key, runner in runners.items():
        fvu, l0 = score(runner, data.held_out, task.batch)
        found.append({"library": key[0], "variant": key[1], "fvu": fvu, "l0": l0, "equal_time": at_time[key]})
    return found


# ---------------------------------------------------------------- one process per measurement


_forked: tuple[Task, Data]


def _memory_here(key: Key) -> float:
    return memory(*_forked, key)


def measure(kinds: list[str], threads: int, options: argparse.Namespace, keys: list[Key]) -> dict[str, list[dict]]:
    """What one process finds out: for `memory`, `time` and `train`, as asked, records with library and variant."""
    global _forked
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "Sparse invariant checks")  # sae-lens's sparse tensors
    for library in {key[0] for key in keys} & set(MODULES):
        importlib.import_module(MODULES[library])
    frames, held_out = options.frames, 2 * options.fvu_batch
    data = cached(options.cache, frames, held_out) if options.cache else planted(options.d, frames, held_out)
    task = Task(data.raw.shape[1], options.features, options.batch, options.k, options.lr)
    found: dict[str, list[dict]] = {}
    if "memory" in kinds:  # before anything is trained here: the forked processes begin as this one is
        _forked = task, data
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            megabytes = pool.map(_memory_here, keys, chunksize=1)
        found["memory"] = [
            {"library": key[0], "variant": key[1], "peak_memory_mb": mb}
            for key, mb in zip(keys, megabytes, strict=True)
        ]
    if "time" in kinds:
        times = time_steps(task, data, keys, options.rounds)
        found["time"] = [
            {"library": key[0], "variant": key[1], "threads": threads, "step_ms": ms, "floor_ratio": ms / times[FLOOR]}
            for key, ms in times.items()
        ]
    if "train" in kinds:
        plain = [key for key in keys if "+" not in key[1]]  # features put to sleep by hand are no training
        found["train"] = train(replace(task, batch=options.fvu_batch), data, plain, options.steps)
    return found


def in_new_process(kinds: list[str], threads: int, arguments: list[str], keys: list[Key]) -> dict[str, list[dict]]:
    """`measure` in a process whose libraries all know their number of threads from the start."""
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        job = json.dumps({"kinds": kinds, "threads": threads, "keys": keys, "out": str(out)})
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--job", job]
        subprocess.run(command, check=True, env=os.environ | variables, stdout=sys.stderr)
        return json.loads(out.read_text())


# ---------------------------------------------------------------- the tables


def machine() -> str:
    """Processor and its cores, as the table names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def table(times: list[dict], memories: list[dict], trained: list[dict]) -> pd.DataFrame:
    """The columns of sae_training.csv; the floor itself is left out, it has ratio 1."""
    rows = pd.DataFrame([row for row in times if row["library"] != FLOOR[0]])
    for found, columns in ((memories, ["peak_memory_mb"]), (trained, ["fvu", "l0"])):
        names = ["library", "variant"]
        rows = rows.merge(pd.DataFrame(found, columns=names + columns), on=names, how="left")
    rows["version"] = rows["library"].map(installed_version)
    rows["machine"] = machine()
    return rows[COLUMNS].round({"step_ms": 2, "floor_ratio": 3, "peak_memory_mb": 0, "fvu": 4, "l0": 1})


def equal_time_table(trained: list[dict]) -> pd.DataFrame:
    """The columns of sae_training_equal_time.csv."""
    rows = [{"library": row["library"], "variant": row["variant"]} | row["equal_time"] for row in trained]
    return pd.DataFrame(rows, columns=EQUAL_TIME_COLUMNS).round({"seconds": 2, "fvu": 4, "l0": 1})


def verdicts(rows: pd.DataFrame) -> list[str]:
    """How our steps stand to their targets and to the peers' steps, a line each."""
    lines = []
    for threads, part in rows.groupby("threads"):
        ours = part[part["library"] == "eqknobs"].set_index("variant")
        for variant, row in ours.iterrows():
            peers = part[(part["library"] != "eqknobs") & (part["variant"].map(family) == family(variant))]
            found, limit = row["floor_ratio"], TARGETS.get(variant)
            line = f"{threads} thread(s), {variant}: {found:.2f} x floor"
            plain = variant.removesuffix("+auxk")
            if plain != variant and plain in ours.index:
                found, limit = found - ours.loc[plain, "floor_ratio"], AUXK_TARGET
                line += f", AuxK adds {found:.2f}"
            if limit is not None:
                line += f", target {limit}: " + ("met" if found <= limit else f"missed by {found / limit - 1:.0%}")
            if len(peers):
                line += f"; peers {peers['floor_ratio'].min():.2f} to {peers['floor_ratio'].max():.2f}"
                best = peers["fvu"].min()
                if family(variant) in ("topk", "batchtopk") and np.isfinite(best):
                    line += f"; FVU {row['fvu']:.4f}, best peer {best:.4f}"
            lines.append(line)
    return lines


def available(wanted: list[str]) -> list[str]:
    """The libraries of those wanted that can be imported; says of the others why not."""
    script = (
        "import importlib, json, sys\n"
        "out = {}\n"
        "for name, module in json.loads(sys.argv[1]).items():\n"
        "    try:\n        importlib.import_module(module)\n"
        "    except Exception as error:\n        out[name] = repr(error)\n"
        "print(json.dumps(out))\n"
    )
    modules = {library: MODULES.get(library, "eqknobs.sae") for library in wanted}
    command = [sys.executable, "-c", script, json.dumps(modules)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    failed = json.loads(printed.splitlines()[-1])  # a peer may print while it is imported
    for library, reason in failed.items():
        print(f"left out: {library} ({reason})")
    return [library for library in wanted if library not in failed]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps after which FVU is compared")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of everybody, after two that are not")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=output_file, default=str(HERE / "results/sae_training.csv"))
    parser.add_argument("--d", type=int, default=512, help="width of the latents (--cache: the cache's)")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--fvu-batch", type=int, default=1024, help="frames of a step where FVU is compared")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--frames", type=int, default=65536, help="train frames")
    parser.add_argument("--variants", nargs="+", default=ALL_FAMILIES, choices=ALL_FAMILIES)
    parser.add_argument("--libraries", nargs="+", default=["eqknobs", *MODULES], choices=["eqknobs", *MODULES])
    parser.add_argument("--cache", help="a finished activation cache instead of planted directions")
    parser.add_argument("--lr", type=float, help="one learning rate for all, instead of each one's own")
    parser.add_argument("--sweep", type=float, nargs="+", metavar="LR", help="only FVU, at each of these rates")
    parser.add_argument("--quick", action="store_true", help="a small shape and few steps, in a minute")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.d, options.features, options.batch, options.k = 128, 1024, 1024, 8
        options.fvu_batch, options.frames, options.steps, options.rounds = 512, 16384, 20, 3
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.job:
        job = json.loads(options.job)
        found = measure(job["kinds"], job["threads"], options, [tuple(key) for key in job["keys"]])
        Path(job["out"]).write_text(json.dumps(found))
        return
    keys = list(makers(available(options.libraries), options.variants))
    most = max(options.threads)
    if options.sweep:
        for rate in options.sweep:
            found = in_new_process(["train"], most, [*arguments, "--lr", str(rate)], keys)["train"]
            print(pd.DataFrame(found).drop(columns="equal_time").assign(lr=rate).to_string(index=False), flush=True)
        return
    times, memories, trained = [], [], []
    for threads in options.threads:
        kinds = ["time"] + ["memory"] * (threads == options.threads[0]) + ["train"] * (threads == most)
        found = in_new_process(kinds, threads, arguments, keys)
        times, memories = times + found["time"], memories + found.get("memory", [])
        trained += found.get("train", [])
    rows, equal_time = table(times, memories, trained), equal_time_table(trained)
    print({name: getattr(options, name) for name in ("d", "features", "batch", "fvu_batch", "k", "steps", "rounds")})
    print(rows.drop(columns="machine").to_string(index=False), equal_time.to_string(index=False), sep="\n\n")
    print(machine(), *verdicts(rows), sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.out, index=False)
    equal_time.to_csv(options.out.with_name(f"{options.out.stem}_equal_time.csv"), index=False)


if __name__ == "__main__":
    main(sys.argv[1:])
