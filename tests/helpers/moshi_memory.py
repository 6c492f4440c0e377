"""Peak anonymous memory of loading and packing a checkpoint: `python -m helpers.moshi_memory FOLDER` prints JSON.

In a process of its own, because what was freed before would hide what is needed.
"""

import json
import sys
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.models.moshi.config import MoshiConfig, raw_config
from eqknobs.models.moshi.quantise import Nf4
from helpers.moshi_world import hub_tensors

LARGE = MoshiConfig(2048, 18, 16, 5632, 512, 2, 8, 1408, text_card=8000)  # 1.1e9 weights


def write_large(folder: Path) -> int:
    """A single-file checkpoint of `LARGE`; returns its bytes. Values repeat: drawing so many would take a minute."""
    pool = np.random.RandomState(0).standard_normal(1 << 20).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(hub_tensors(LARGE, 8, 0, lambda shape: np.resize(pool, shape)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw_config(LARGE)))
    return (folder / "model.safetensors").stat().st_size


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; pages mapped from files can be dropped and do not count."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def measure(folder: Path) -> dict[str, int]:
    """packed: bytes of all parameters once loaded; largest: tensor of the file; peak: anonymous memory."""
    files, done, peak = find_files("large", str(folder)), Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    net = load_net(files, torch.bfloat16, Nf4())
    done.set()
    watcher.join()
    with safe_open(files.weights, framework="pt") as file:
        largest = max(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    packed = sum(value.nbytes for value in net.state_dict().values())
    return {"packed": packed, "largest": largest, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
