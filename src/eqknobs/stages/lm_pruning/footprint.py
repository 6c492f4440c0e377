"""Memory and time of a saved Moshi that answers: `python -m eqknobs.stages.lm_pruning.footprint FOLDER DTYPE DEVICE
FRAMES` prints JSON: peak_bytes (above what the libraries take), step_seconds (median wall time of a frame).

On a CPU, memory is what is resident and no file's, with all weights copied there (pages that are mapped twice would
count twice); on a GPU what PyTorch has allocated.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread

import torch
from safetensors import safe_open

from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.config import MoshiConfig, Nf4
from eqknobs.models.moshi.generate import Dialogue
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.models.moshi.quantise import MARK

EVERY = 0.002  # seconds between two looks at the memory
WARM = 5  # frames that are not timed


def resident() -> int:
    """Anonymous resident memory of this process in bytes; elsewhere than on Linux the most memory it ever had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def watched() -> Iterator[list[int]]:
    """While the block runs, the list's one entry is the most memory that was seen."""
    done, most = Event(), [resident()]

    def watch() -> None:
        while not done.wait(EVERY):
            most[0] = max(most[0], resident())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()
        most[0] = max(most[0], resident())


def warm_up(nf4: Nf4 | None) -> None:
    """Load a tiny model and let it answer, so that what the libraries take once is not counted as the model's."""
    tiny = MoshiConfig(64, 1, 1, 64, 64, 1, 1, 64, text_card=8, card=8, silence=(1,) * 8, sine=(1,) * 8)
    with tempfile.TemporaryDirectory() as temporary:
        save_net(MoshiNet(tiny), Path(temporary) / "tiny")
        net = load_net(find_files("tiny", f"{temporary}/tiny"), nf4=nf4)
        dialogue = Dialogue(net, 2)
        for _ in range(2):
            dialogue.step(torch.tensor([tiny.silence]))


def measure(folder: Path, dtype: str, device: str, frames: int) -> dict[str, float]:
    """peak_bytes and step_seconds."""
    files = find_files("pruned", str(folder))
    with safe_open(files.weights, framework="pt") as file:
        warm_up(Nf4(double=False) if any(name.endswith(MARK) for name in file.keys()) else None)  # noqa: SIM118
    before = resident()
    with watched() as most:
        net = load_net(files, getattr(torch, dtype), device=device)
        if device == "cpu":
            for weight in net.parameters():
                weight.data = weight.data.clone()
        dialogue, user = Dialogue(net, frames), torch.tensor([net.config.silence], device=device)
        for _ in range(WARM):
            dialogue.step(user)
    found = []
    for _ in range(frames - WARM):
        begun = time.perf_counter()
        dialogue.step(user)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else most[0] - before
    return {"peak_bytes": peak, "step_seconds": median(found)}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))))
