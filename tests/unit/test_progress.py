"""The line on a stage in Snakemake's output."""

import logging

import pytest

from eqknobs.progress import StageProgress, duration


def test_a_stage_of_several_jobs_tells_how_many_are_done_and_when_the_others_will_be() -> None:
    now, said = [0.0], []
    logger = logging.Logger("snakemake")
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(listener)
    logger.addHandler(StageProgress(logger, lambda: now[0]))

    def event(name: str, **more: object) -> None:
        logger.info("", extra={"event": name, **more})

    def start(*jobs: int) -> None:
        for job in jobs:
            event("job_info", jobid=job, rule_name="sae" if job < 9 else "tables")

    event("run_info", stats={"sae": 5, "tables": 1, "total": 6})
    start(1, 2)
    now[0] = 60
    event("job_finished", job_id=1)  # 60 s; four are left, two at once
    start(3)
    now[0] = 100
    event("job_finished", job_id=2)  # 100 s; 80 on average
    start(4, 5)
    event("job_finished", job_id=99)  # of nobody knows what
    for job in (3, 4, 5):
        event("job_finished", job_id=job)
    start(9)
    event("job_finished", job_id=9)  # a stage of one job has its bar
    assert [line for line in said if line] == [
        "sae: 1 of 5 jobs done, about 2 min left",
        "sae: 2 of 5 jobs done, about 3 min left",
        "sae: 3 of 5 jobs done, about 67 s left",
        "sae: 4 of 5 jobs done, about 50 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
