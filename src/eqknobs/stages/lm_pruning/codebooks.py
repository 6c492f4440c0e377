"""A speech LM with fewer codebooks, in the four readings of "4 of 8 work fine", and with fewer of the user's.

`a`: all are generated, the first n decoded: what the codec alone costs. `b`: in place of the others nothing is fed
back, a state that was never trained; `c`: the codes of silence. `d`: as `b`, but the depformer has n steps only, so
that it is faster and smaller; its answers are those of `b` but for the sampler's draws. `user`: the model hears n of
the user's.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.interventions import first_codebooks
from eqknobs.speaking.answers import Answer, frame_seconds, free_codebooks, speak
from eqknobs.speaking.bench import sampling
from eqknobs.speaking.prompts import Asked
from eqknobs.stages.lm_pruning.bench import CodebooksCfg, PruningBench


def codebook_rows(bench: PruningBench, cfg: CodebooksCfg) -> list[dict[str, Any]]:
    """One record an answer of each reading and count; `step_ratio` is the time of a frame beside the whole model's.

    Raises EqknobsError for more codebooks than the model has.
    """
    model, codebooks = bench.model, bench.model.config.codebooks
    if (most := max(cfg["counts"])) > codebooks:
        raise EqknobsError(f"config: lm_pruning.codebooks.counts: the model has {codebooks} codebooks, not {most}")
    asked, records = bench.speech["asked"][: cfg["count"]], []
    whole = frame_seconds(model, asked[0])
    for reading in cfg["readings"]:
        for count in cfg["counts"]:
            rows = heard_by(model, asked, count) if reading == "user" else asked
            fixed = fixed_codes(model, reading, count)
            with shortened(model, reading, count):
                found = speak(model, rows, sampling(bench.cfg, 0), bench.cfg["batch"], fixed=fixed)
                seconds = whole if reading in ("a", "user") else frame_seconds(model, rows[0], fixed)
            for row, answer in zip(rows, found, strict=True):
                left = answer if reading == "user" else Answer(answer.text, answer.codes[:count])
                about = {"reading": reading, "codebooks": count, "id": row.id, "speaker": row.speaker}
                records.append({**about, **bench.judge.record(row, left, rated=False), "step_ratio": seconds / whole})
    return records


def fixed_codes(model: Moshi, reading: str, count: int) -> list[int] | None:
    """`speak`'s `fixed` of a reading."""
    filler = model.config.silence if reading == "c" else None
    return free_codebooks(count, model.config.codebooks, filler) if reading in ("b", "c") else None


def shortened(model: Moshi, reading: str, count: int) -> AbstractContextManager[None]:
    """While the block runs, the depformer is as short as a reading wants it."""
    return first_codebooks(model.net, count) if reading == "d" else nullcontext()


def heard_by(model: Moshi, asked: Sequence[Asked], count: int) -> list[Asked]:
    """The same prompts, but of the user's codebooks only the first `count` are there."""
    kept = torch.arange(model.config.codebooks)[:, None] < count
    return [replace(row, user=torch.where(kept, row.user, -1)) for row in asked]
