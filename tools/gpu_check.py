"""What only a GPU can tell, in one command of ten minutes: `bash tools/gpu_check.sh` (docs/gpu.md).

    bash tools/gpu_check.sh                      # all parts, on the GPU; writes benchmarks/results/gpu_check.csv
    bash tools/gpu_check.sh --parts sae moshi    # some
    bash tools/gpu_check.sh --cpu --out x.csv    # rehearse the script itself without a GPU, at tiny sizes

Each part is on its own: one that fails leaves a row that says so, and the next one runs. The table is written anew
after every part, so that a run which is cut short leaves what it knows.
"""

import argparse
import gc
import math
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("tests", "tools", "benchmarks")]

import rehearse  # noqa: E402
from eqknobs.errors import EqknobsError, one_line_errors  # noqa: E402
from eqknobs.io import output_file, read_csv, write_csv  # noqa: E402

GIB = 1 << 30
CAP_GIB = 12  # a hard limit of the allocator while the 7B model works
SECONDS = 20.0  # of sound that is cached, and of the answer
HEADS = 200  # taken out
FRAME_MS = 80.0  # a step that takes longer is slower than speech
COLUMNS = ["part", "measure", "value", "unit", "limit", "passed", "device", "machine"]
CLOSE = (0.05, 0.02)  # relative and absolute difference that a number of the demo may have on a GPU
MOST_APART = 0.1  # share of numbers that may differ by more: training amplifies last digits


@dataclass
class Check:
    """One run: where it computes, how large, and the rows that it has found."""

    device: str
    tiny: bool
    work: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def found(self, part: str, measure: str, value: float, unit: str, limit: float | None = None) -> None:
        """Note a value; limit: the most that it may be."""
        passed = None if limit is None else bool(value <= limit)
        self.rows.append({"part": part, "measure": measure, "value": value, "unit": unit, "limit": limit})
        self.rows[-1]["passed"] = passed
        print(f"{part}: {measure}: {value:.4g} {unit}", "" if limit is None else f"(at most {limit:g})", flush=True)

    def failed(self, part: str, why: str) -> None:
        """Note that a part ended early, and why."""
        self.rows.append({"part": part, "measure": f"failed: {why[:200]}", "passed": False})
        print(f"{part}: failed: {why}", flush=True)

    def skipped(self, part: str, why: str) -> None:
        """Note that a part was left out."""
        self.rows.append({"part": part, "measure": f"left out: {why[:200]}"})
        print(f"{part}: left out: {why}", flush=True)

    def table(self) -> pd.DataFrame:
        rows = pd.DataFrame(self.rows, columns=COLUMNS)
        return rows.assign(device=device_name(self.device), machine=rehearse.machine())


def device_name(device: str) -> str:
    """The card's name, as the table has it; cpu for a rehearsal of this script."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def settled(device: str) -> float:
    """Now, in seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Peak:
    """Most memory that the device held since `reset`, bytes; nan on a CPU, whose memory tools/rehearse.py measures."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.reset()

    def reset(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def gib(self) -> float:
        return torch.cuda.max_memory_reserved() / GIB if self.cuda else math.nan


# ---------------------------------------------------------------- parts


def check_tests(check: Check) -> None:
    """The unit tests that need CUDA; they skip themselves without."""
    files = ["tests/unit/packing/test_modules.py", "tests/unit/models/moshi/test_moshi.py"]
    words = ["-q", "-k", "gpu or cuda", "-p", "no:cacheprovider", *files]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()[-1:] or [done.stderr[-200:]]
    print(done.stdout[-2000:])
    check.found("tests", f"exit status of pytest ({said[0].strip('= ')})", float(done.returncode), "", 0)


def check_moshi(check: Check) -> None:
    """A 7B model in NF4 under a hard cap: it loads, hears, answers, loses heads; then packed integers of 3 bits."""
    from eqknobs.models.moshi.interventions import remove_heads
    from eqknobs.models.moshi.memory import SEVEN_B
    from helpers.moshi_world import KYUTAI

    size, device, part = (KYUTAI if check.tiny else SEVEN_B), check.device, "moshi nf4"
    seconds, heads = (2.0, 4) if check.tiny else (SECONDS, HEADS)
    folder, codec = written(check, size)
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * GIB / total))
    model = loaded(check, part, folder, codec)
    heard(check, part, model, seconds)
    frames = math.ceil(seconds * 12.5)
    answered(check, part, model.net, frames)
    rng = random.Random(0)
    places = rng.sample([(layer, head) for layer in range(size.layers) for head in range(size.heads)], heads)
    out = {layer: [head for at, head in places if at == layer] for layer in {at for at, _ in places}}
    start = settled(device)
    remove_heads(model.net, out)
    check.found(part, f"remove {heads} heads", settled(device) - start, "s")
    answered(check, f"{part}, {heads} heads less", model.net, min(frames, 50))
    files = model.files
    del model
    net = packed_from(files, device, check)
    answered(check, "moshi 3 bits", net, min(frames, 50))


def written(check: Check, size: Any) -> tuple[Path, Path]:
    """Folders of a random Moshi and of its codec, written unless they are there."""
    from helpers.moshi_world import write_codec

    folder, codec = check.work / "moshi", check.work / "mimi"
    start = time.perf_counter()
    if not (folder / "config.json").is_file():
        rehearse.write_moshi(folder, 0, size)
    if not (codec / "config.json").is_file():
        write_codec(codec) if check.tiny else rehearse.write_mimi(codec, 0)
    check.found("moshi nf4", "write the random checkpoint", time.perf_counter() - start, "s")
    return folder, codec


def loaded(check: Check, part: str, folder: Path, codec: Path) -> Any:
    """The model in NF4, as `models.<name>.nf4: true` gives it; its time and peak."""
    from eqknobs.models.moshi.adapter import Moshi

    start, peak = settled(check.device), Peak(check.device)
    model = Moshi(
        {
            "name": "moshi",
            "kind": "moshi",
            "path": str(folder),
            "revision": None,
            "codec": str(codec),
            "device": check.device,
            "nf4": True,
            "dtype": "bfloat16",
        }
    )
    check.found(part, "load", settled(check.device) - start, "s")
    check.found(part, "peak memory, load", peak.gib(), "GiB", CAP_GIB if check.device == "cuda" else None)
    return model


def heard(check: Check, part: str, model: Any, seconds: float) -> None:
    """Cache so much noise at two sites. Raises EqknobsError where activations are not finite."""
    noise = np.random.default_rng(0).standard_normal(round(seconds * model.sample_rate)).astype(np.float32)
    wav = 0.05 * np.convolve(noise, np.ones(16, np.float32) / 16, "same")
    last = model.config.layers - 1
    peak, start = Peak(check.device), settled(check.device)
    acts = model.encode_sites(wav, [f"residual.{last}", f"heads.{last}"])
    check.found(part, f"cache {seconds:g} s at two sites of the last layer", settled(check.device) - start, "s")
    check.found(part, "peak memory, cache", peak.gib(), "GiB", CAP_GIB if check.device == "cuda" else None)
    if not all(np.isfinite(values).all() for values in acts.values()):
        raise EqknobsError("activations are not finite")


def packed_from(files: Any, device: str, check: Check) -> Any:
    """A Moshi whose temporal linears are packed integers of 3 bits: the file stays mapped, one weight is on the device
    at a time."""
    from eqknobs.models.moshi.checkpoint import load_net
    from eqknobs.models.moshi.interventions import linears
    from eqknobs.packing.modules import packed_module, put_module
    from eqknobs.packing.plan import Plan, packable

    start, peak = settled(device), Peak(device)
    net = load_net(files, torch.bfloat16)
    names = [f"{name}.weight" for name in linears(net)]
    shapes = {name: shape for name, shape in packable(net).items() if name in names}
    plan = Plan.uniform(shapes, 3, group=128 if not check.tiny else 32)
    for name in names:
        owner = name.removesuffix(".weight")
        module = net.get_submodule(owner)
        packed = plan.quantise(name, net.get_parameter(name).to(device))
        put_module(net, owner, packed_module(module, packed))
    net = net.to(device)
    check.found("moshi 3 bits", f"pack {len(names)} linears", settled(device) - start, "s")
    check.found("moshi 3 bits", "peak memory, pack", peak.gib(), "GiB", CAP_GIB if device == "cuda" else None)
    return net


def answered(check: Check, part: str, net: Any, frames: int) -> None:
    """Let it answer silence for so many frames; the median step, and the memory."""
    from eqknobs.models.moshi.generate import GREEDY, Dialogue

    peak, taken = Peak(check.device), []
    user = torch.tensor(net.config.silence, device=net.device)[None]
    dialogue = Dialogue(net, frames, 1, None, GREEDY)
    begun = settled(check.device)
    for _ in range(frames):
        start = settled(check.device)
        reply = dialogue.step(user)
        taken.append(1000 * (settled(check.device) - start))
    seconds = settled(check.device) - begun
    if not ((reply.codes >= 0) & (reply.codes < net.config.card)).all():
        raise EqknobsError(f"{part}: codes beyond the codebook")
    check.found(part, "streaming step, median", median(taken), "ms", FRAME_MS if check.device == "cuda" else None)
    check.found(part, f"answer of {frames / 12.5:g} s", frames / 12.5 / seconds, "x real time")
    check.found(part, "peak memory, answer", peak.gib(), "GiB", CAP_GIB if check.device == "cuda" else None)


def check_sae(check: Check) -> None:
    """A training step of every variant, beside six dense products, dense PyTorch and the peers that are installed;
    TopK also with the sparse products that are the faster ones on a CPU."""
    import sae_training
    from eqknobs.sae import unit_norm
    from sae_contestants import Task, makers

    sizes = (64, 256, 256, 8) if check.tiny else (512, 4096, 4096, 32)
    task = Task(*sizes, device=check.device)
    data = sae_training.planted(task.d, 4 * task.batch, task.batch)
    data = sae_training.Data(*(value.to(check.device) for value in (data.raw, data.mean, data.std, data.held_out)))
    libraries = sae_training.available(["eqknobs", *sae_training.MODULES])
    build = makers(libraries, sae_training.ALL_FAMILIES)
    floor = sae_training.Floor(task)
    vars(floor).update({name: value.to(check.device) for name, value in vars(floor).items()})
    rounds = 2 if check.tiny else 20
    base = stepped(lambda number: floor.step(*data.batch(number, task.batch)), check.device, rounds)
    check.found("sae", "six dense products", base, "ms")
    check.found("sae", "dense PyTorch, TopK with autograd", dense_topk(task, data, rounds), "ms")
    for key, make in build.items():
        try:
            runner = make(task, data)
            found = stepped(partial(turn, runner, data, task.batch), check.device, rounds)
            check.found("sae", f"{key[0]} {key[1]}", found / base, "x six products")
        except Exception as error:  # a peer that knows no such device is no reason to end
            check.skipped("sae", f"{key[0]} {key[1]}: {error}")
    before = unit_norm.SPARSE_ON
    try:
        unit_norm.SPARSE_ON = (check.device,)
        runner = build["eqknobs", "topk"](task, data)
        found = stepped(partial(turn, runner, data, task.batch), check.device, rounds)
        check.found("sae", "eqknobs topk, sparse products", found / base, "x six products")
    finally:
        unit_norm.SPARSE_ON = before


def turn(runner: Any, data: Any, size: int, number: int) -> None:
    """One training step of a contestant."""
    runner.put_to_sleep()
    runner.step(*data.batch(number, size))


def dense_topk(task: Any, data: Any, rounds: int) -> float:
    """Milliseconds of the plainest step there is: six products by autograd, a mask, fused Adam."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(task.features, task.d, generator=generator).to(task.device) for _ in range(2))
    weights = [w.div_(task.d**0.5).requires_grad_() for w in (first, second)]
    optimiser = torch.optim.Adam(weights, lr=1e-3, fused=True)

    def step(number: int) -> None:
        z = data.batch(number, task.batch)[1]
        h = torch.relu(z @ weights[0].T)
        kept = h.topk(task.k, dim=1, sorted=False)
        code = torch.zeros_like(h).scatter(1, kept.indices, kept.values)
        (z - code @ weights[1]).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return stepped(step, task.device, rounds)


def stepped(step: Callable[[int], object], device: str, rounds: int) -> float:
    """Median milliseconds of a step, after two that are not timed."""
    taken = []
    for number in range(rounds + 2):
        start = settled(device)
        step(number)
        taken.append(1000 * (settled(device) - start))
    return median(taken[2:])


def check_demo(check: Check) -> None:
    """The small workflow of the tests on the device and on the CPU: how far its numbers are apart."""
    try:
        import snakemake  # noqa: F401
    except ImportError as error:
        check.skipped("demo", f"{error}")
        return
    from helpers import workflow

    whole = True
    try:
        import faster_whisper  # noqa: F401
        import resemblyzer  # noqa: F401
        import torchcrepe  # noqa: F401
    except ImportError as error:
        whole = False
        print(f"demo: without what is judged ({error})", flush=True)
    goals = [] if whole else ["dictionaries", "probings", "sounds"]
    folders = {}
    for device in dict.fromkeys((check.device, "cpu")) if not check.tiny else ("cpu",):
        folders[device] = workflow.copy_workflow(check.work / f"demo-{device}")

        def change(config: dict[str, Any], device: str = device) -> None:
            config["hardware"] |= {"device": device, "threads": 4}
            if not whole:
                config["probes"]["properties"] = ["centroid", "rms"]
            if check.tiny:
                config["run"]["targets"] = ["tiny-mimi.encoder_transformer"]

        workflow.write_config(folders[device], change)
        start = time.perf_counter()
        targets = ["manifests"] if check.tiny else goals
        workflow.snakemake(folders[device], *targets, "--cores", "8", "--resources", "gpu=1")
        check.found("demo", f"the tests' small run on {device}", time.perf_counter() - start, "s")
    first, last = folders[check.device], folders["cpu"]
    part = "manifest" if check.tiny else "tables" if whole else "scores"
    compared = list(compare(first / "results/small" / part, last / "results/small" / part))
    for name, apart, largest in compared:
        check.found(
            "demo", f"{part}/{name}: numbers apart (largest relative {largest:.3g})", apart, "share", MOST_APART
        )
    if not compared:
        raise EqknobsError(f"no table below results/small/{part}")


def compare(one: Path, other: Path) -> Iterator[tuple[str, float, float]]:
    """Of every CSV in two folders: its name, the share of its numbers that are not close (all of them where texts or
    shapes differ), the largest relative difference. Seconds that were measured are left out."""
    for file in sorted(one.glob("*.csv")):
        a, b = read_csv(file), read_csv(other / file.name)
        if list(a.columns) != list(b.columns) or len(a) != len(b):
            yield file.name, 1.0, math.inf
            continue
        kept = [name for name in a.select_dtypes("number").columns if "second" not in name and "ratio" not in name]
        x, y = (table[kept].to_numpy(float) for table in (a, b))
        both = np.isfinite(x) & np.isfinite(y)
        apart = np.abs(x - y) > CLOSE[1] + CLOSE[0] * np.abs(y)
        wrong = np.where(both, apart, np.isfinite(x) != np.isfinite(y))
        relative = np.abs(x - y)[both] / np.maximum(np.abs(y)[both], CLOSE[1])
        yield file.name, float(wrong.mean()) if wrong.size else 0.0, float(relative.max()) if relative.size else 0.0


PARTS: dict[str, Callable[[Check], None]] = {
    "tests": check_tests,
    "sae": check_sae,
    "moshi": check_moshi,
    "demo": check_demo,
}


def run(check: Check, parts: list[str], out: Path) -> None:
    """Run parts one after another, writing the table after each."""
    for part in parts:
        start = time.perf_counter()
        try:
            PARTS[part](check)
        except Exception as error:
            traceback.print_exc()
            check.failed(part, " ".join(f"{type(error).__name__}: {error}".split()))
        if check.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        check.found(part, "the whole part", time.perf_counter() - start, "s")
        write_csv(out, check.table())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--cpu", action="store_true", help="rehearse the script at tiny sizes, without a GPU")
    parser.add_argument("--out", type=output_file, default=str(ROOT / "benchmarks/results/gpu_check.csv"))
    parser.add_argument("--work", type=Path, help="where checkpoints and runs go: 16 GB; default: a temporary folder")
    args = parser.parse_args(arguments)
    with one_line_errors(), tempfile.TemporaryDirectory() as scratch:
        if not args.cpu and not torch.cuda.is_available():
            raise EqknobsError("torch sees no GPU: --cpu rehearses this script without one")
        if args.cpu and args.out.resolve() == (ROOT / "benchmarks/results/gpu_check.csv").resolve():
            raise EqknobsError("--cpu: measures nothing; name another --out than the committed table")
        check = Check("cpu" if args.cpu else "cuda", args.cpu, args.work or Path(scratch))
        run(check, args.parts, args.out)
        wrong = [row for row in check.rows if row.get("passed") is False]
        print(f"wrote {args.out}: {len(check.rows)} rows, {len(wrong)} not passed")
        return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
