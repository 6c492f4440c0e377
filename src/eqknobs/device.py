"""Which device computes, and one process at a time on the GPU."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eqknobs.errors import EqknobsError


def pick_device(device: str) -> str:
    """Resolve auto | cpu | cuda. Raises EqknobsError if cuda is asked for and absent."""
    if device == "cpu":
        return "cpu"  # without torch, whose import takes a second
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EqknobsError("device: cuda was asked for, but torch sees no GPU; set device to auto or cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


_lock_depth = 0


@contextmanager
def gpu_lock(device: str = "auto") -> Iterator[None]:
    """Keep other processes of this user off the GPU while the block runs; does nothing on a CPU.

    Snakemake's `gpu` resource counts within one invocation only; two invocations with different targets
    would share the card. The lock is a file in the temporary directory and ends with the process, however
    that ends. Nested uses in one process are harmless. A job to which Slurm gave its GPUs shares them with nobody.
    """
    global _lock_depth
    if "SLURM_JOB_GPUS" in os.environ or (device != "cuda" and pick_device(device) != "cuda"):
        yield
        return
    with open(Path(tempfile.gettempdir()) / f"eqknobs-gpu-{os.getuid()}.lock", "a+") as file:
        if _lock_depth == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read() or "another process"
                print(f"waiting for the GPU: {owner} holds it", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"process {os.getpid()} in {Path.cwd()}")
            file.flush()
        _lock_depth += 1
        try:
            yield
        finally:
            _lock_depth -= 1
