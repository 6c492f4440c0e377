"""What Snakemake's output says of a stage when one of its jobs is done: how many are, and how long the rest will take.

Within a job its own bar tells; this is for stages of several jobs.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable


class StageProgress(logging.Handler):
    """A handler of Snakemake's logger that adds `labels: 3 of 12 jobs done, about 2 min left` to it.

    The time left is the mean of the jobs that are done times those that are not, by as many at a time as now.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._logger, self._clock = logger, clock
        self._jobs: dict[str, int] = {}  # of each rule
        self._running: dict[int, tuple[str, float]] = {}  # job -> its rule, and since when
        self._seconds: dict[str, list[float]] = defaultdict(list)  # of the jobs of a rule that are done

    def emit(self, record: logging.LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        if event == "run_info":
            self._jobs = dict(getattr(record, "stats", {}))
        elif event == "job_info":
            self._running[record.__dict__["jobid"]] = record.__dict__["rule_name"], self._clock()
        elif event == "job_finished" and (found := self._running.pop(record.__dict__["job_id"], None)):
            self._finished(*found)

    def _finished(self, rule: str, since: float) -> None:
        at_once = 1 + sum(rule == other for other, _ in self._running.values())
        seconds = self._seconds[rule]
        seconds.append(self._clock() - since)
        if (left := self._jobs.get(rule, 0) - len(seconds)) > 0:
            each = sum(seconds) / len(seconds)
            about = duration(each * -(-left // at_once))
            self._logger.info(f"{rule}: {len(seconds)} of {self._jobs[rule]} jobs done, about {about} left")


def duration(seconds: float) -> str:
    """A time in words, as exact as a guess is: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
