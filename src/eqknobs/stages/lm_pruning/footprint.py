"""Memory and time of a saved Moshi that answers: `python -m eqknobs.stages.lm_pruning.footprint FOLDER DTYPE DEVICE
FRAMES` prints JSON: peak_bytes (above what the libraries take), step_seconds (median wall time of a frame).

On a CPU, memory is what is resident, weights mapped from the file included; on a GPU what PyTorch has allocated.
"""

import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open

from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.models.moshi.generate import Dialogue
from eqknobs.models.moshi.quantise import MARK, bitsandbytes

WARM = 5  # frames that are not timed


def resident(name: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most) of this process in bytes; elsewhere than on Linux the most it ever had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(folder: Path, dtype: str, device: str, frames: int) -> dict[str, float]:
    """peak_bytes and step_seconds."""
    files = find_files("pruned", str(folder))
    with safe_open(files.weights, framework="pt") as file:
        if any(name.endswith(MARK) for name in file.keys()):  # noqa: SIM118
            bitsandbytes()  # the library takes memory of its own
    if device != "cuda":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    net = load_net(files, getattr(torch, dtype), device=device)
    dialogue, user = Dialogue(net, frames), torch.tensor([net.config.silence], device=device)
    found = []
    for _ in range(frames):
        begun = time.perf_counter()
        dialogue.step(user)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before
    return {"peak_bytes": peak, "step_seconds": median(found[WARM:])}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))))
