"""Moshi's streaming step and teacher-forced pass, ours beside the moshi package's, on the same random weights.

    python benchmarks/moshi_speed.py [--quick] [--threads N]

Both take turns (ours, theirs, ours, …), so that whatever else the machine does meets both alike; the ratio is the
median of theirs / ours, turn by turn. Columns of benchmarks/results/moshi_speed.csv: case (what is timed), size
(small, or tiny with --quick), threads, ours_ms and moshi_ms (medians), ratio (above 1: ours is faster), turns, machine.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

os.environ["NO_TORCH_COMPILE"] = os.environ["NO_CUDA_GRAPH"] = "1"  # read when moshi is imported

import pandas as pd
import torch
from moshi.models import LMGen, LMModel, loaders
from safetensors.torch import save_file

from eqknobs.io import output_file, write_csv
from eqknobs.models.moshi.checkpoint import MoshiFiles, load_net
from eqknobs.models.moshi.config import MoshiConfig, raw_config
from eqknobs.models.moshi.generate import Dialogue
from eqknobs.models.moshi.network import MoshiNet

HERE = Path(__file__).resolve().parent
SIZES = {
    "small": MoshiConfig(1024, 8, 8, 2816, 512, 4, 8, 1408, text_card=8000),
    "tiny": MoshiConfig(256, 2, 2, 704, 128, 2, 2, 352, text_card=500),
}
SHORT_CONTEXT = 64  # columns; after these the caches are rings, which both fill before anything is timed
Case = tuple[str, Callable[[], object], Callable[[], object]]


def models(config: MoshiConfig) -> tuple[MoshiNet, LMModel]:
    """Ours and theirs from one checkpoint, float32."""
    torch.manual_seed(0)
    theirs = loaders.get_moshi_lm(None, lm_kwargs=raw_config(config), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        weights, sizes = Path(scratch) / "model.safetensors", Path(scratch) / "config.json"
        save_file(theirs.state_dict(), weights)
        sizes.write_text(pd.Series(raw_config(config)).to_json())
        return load_net(MoshiFiles(sizes, weights, None, "random")), theirs


def cases(config: MoshiConfig, frames: int) -> Iterator[Case]:
    """What is timed: (name, ours, theirs), one call a turn."""
    for name, context, warm in (("start", 3000, 4), ("ring", SHORT_CONTEXT, SHORT_CONTEXT + 4)):
        net, lm = models(replace(config, context=context))
        user = torch.randint(config.card, (1, 8))
        dialogue = Dialogue(net, frames=1 << 14)
        generator = LMGen(lm, use_sampling=False)
        generator.streaming_forever(1)

        def ours(dialogue: Dialogue = dialogue, user: torch.Tensor = user) -> object:
            return dialogue.step(user)

        def theirs(generator: LMGen = generator, user: torch.Tensor = user) -> object:
            return generator.step(user[..., None])

        for _ in range(warm):
            ours(), theirs()
        yield f"streaming step, {name} of context {context}", ours, theirs
    net, lm = models(config)
    codes = torch.randint(min(config.card, config.text_card), (1, 17, frames))
    columns = net.columns(codes)[:, :, :-1]
    yield f"teacher-forced pass, {frames} frames", lambda: net(codes), lambda: lm(codes)
    yield (
        f"temporal transformer only, {frames} frames",
        lambda: net(codes, depformer=False),
        lambda: lm.forward_text(columns),
    )


@torch.inference_mode()
def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def machine() -> str:
    """Processor and its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few turns: seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=output_file, default=str(HERE / "results/moshi_speed.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, frames, turns = ("tiny", 50, 8) if options.quick else ("small", 250, 40)
    rows = []
    for name, ours, theirs in cases(SIZES[size], frames):
        count = turns if "step" in name else max(3, turns // 5)
        times = [(timed(ours), timed(theirs)) for _ in range(count + 1)][1:]  # the first turn sets up
        mine, peers = (median(column) for column in zip(*times))
        ratio = median(b / a for a, b in times)
        row = (name, size, options.threads, round(mine, 2), round(peers, 2), round(ratio, 3), count, machine())
        rows.append(row)
        print(*row[:-1], sep=", ", flush=True)
    columns = ["case", "size", "threads", "ours_ms", "moshi_ms", "ratio", "turns", "machine"]
    write_csv(options.out, pd.DataFrame(rows, columns=columns))


if __name__ == "__main__":
    main()
