"""What the thin scripts under `workflow/scripts` share: log, threads, and errors of one line."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from eqknobs.errors import one_line_errors, printable
from eqknobs.plan import SPEECH, corpus_config, corpus_of, parse_target
from eqknobs.shards import whole


def _one_line_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Ctrl-C while a script still imports its libraries, which takes seconds: each imports this module first.
sys.excepthook = _one_line_interrupt


class _Tee:
    """Write to the terminal (progress) and to the job's log, what is printable of it."""

    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        said = printable(text)
        for stream in self.streams:
            stream.write(said)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()

    def isatty(self) -> bool:
        return self.streams[0].isatty()


def run(main: Callable[..., None], snakemake: Any) -> None:
    """Call `main(input, output, cfg)` of a script with Snakemake's job object.

    Everything printed goes to the terminal and to the rule's log. What `one_line_errors` knows becomes one line and an
    exit status; of what the operating system refused, the log keeps the traceback. SIGTERM ends the job as Ctrl-C does,
    so that half-written files go.
    """
    os.environ["OMP_NUM_THREADS"] = str(snakemake.threads)  # read by CTranslate2 when the judge starts
    if not snakemake.resources.get("gpu", 0):  # a job without the GPU resource must not touch the card
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(snakemake.threads)
        sys.modules["torch"].use_deterministic_algorithms(True, warn_only=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = Path(snakemake.log[0])
    with one_line_errors():
        from eqknobs.io import remove_leftovers, require_output, writer_lock

        # An orphan of a killed Snakemake may still be at work on these very outputs: the second job waits for it.
        with writer_lock(log), log.open("w") as file:
            for output in map(Path, snakemake.output):
                require_output(output, folder=None, name="output")
                remove_leftovers(output)
                remove_leftovers(output.parent)
            _run_logged(main, snakemake, file)


def _with_circumstances(snakemake: Any) -> dict[str, Any]:
    """The job's slice of the configuration, and what is no part of it as it does not decide what is made: the device
    that it is to run on, how speech is downloaded, a limit of the draw that may not bind (`plan.as_drawn`), and for a
    job that caches a target its siblings (sites of the same model on the same corpus) with their outputs; for one that
    does a shard of a job's clips, which."""
    cfg = dict(snakemake.params.cfg)
    device = snakemake.config["hardware"]["device"]
    if "source" in cfg.get("data", {}):  # the speech of a run; a training's `data` is its folders
        data = corpus_config(snakemake.config, snakemake.wildcards.get("corpus", SPEECH))
        free = ("url", "timeout_seconds", "max_minutes")
        cfg["data"] = cfg["data"] | {key: value for key, value in data.items() if key in free}
    if "kind" in cfg.get("model", {}):  # the model of a target; a training's `model` is its sizes
        cfg["model"] = {**cfg["model"], "device": device}
    if (shard := getattr(getattr(snakemake, "wildcards", None), "shard", None)) is not None:
        cfg["shard"] = (int(shard), int(snakemake.wildcards.shards))
    if getattr(snakemake, "rule", "") in ("activations", "activations_shard"):
        output = str(whole(snakemake.output[0]))
        cfg["siblings"] = _siblings(snakemake.wildcards.target, output, snakemake.config["worked_on"])
    return {**cfg, "device": device}


def _siblings(target: str, output: str, targets: list[str]) -> dict[str, str]:
    """Site and output of the other targets of a target's model, on its corpus."""
    own, (model, site) = Path(output), parse_target(target)
    others = [o for o in targets if parse_target(o)[0] == model and corpus_of(o) == corpus_of(target)]
    found = {parse_target(other)[1]: str(own.with_name(own.name.replace(target, other, 1))) for other in others}
    return {other: path for other, path in found.items() if other not in (site, "")}


def _run_logged(main: Callable[..., None], snakemake: Any, file: TextIO) -> None:
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tee(out, file), _Tee(err, file)
    try:
        with one_line_errors():
            try:
                cfg = _with_circumstances(snakemake)
                shard = "shard" in cfg
                main(snakemake.input, snakemake.output, cfg)
                if shard:
                    Path(snakemake.output[0]).touch()  # all that a shard declares
            except OSError:
                traceback.print_exc(file=file)
                raise
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        print(stop.code, file=sys.stderr)
        sys.exit(1)
    finally:
        sys.stdout, sys.stderr = out, err
