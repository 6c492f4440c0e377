"""Shards: jobs that each do some of another job's clips beforehand, and leave them where that job looks first.

Activations and labels lie in the work file that the whole job finishes (`eqknobs.corpus.inplace`), what is measured and
judged of a sound in the store of pieces, and sounds in a folder from which the whole job links them. So a run in shards
has the files of one without, nothing is there twice, and how many shards there are decides no result.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from eqknobs.plan import corpus_config

Shard = tuple[int, int]  # which one, from 0, and of how many
MARK = ".shard-"  # what a shard's mark, which is all that it declares, has after the name of the job's file
Item = TypeVar("Item")


def shards(clips: int, each: int | None) -> int:
    """How many shards `clips` clips are done in, of `each` clips at most; None: one."""
    return 1 if each is None else max(1, math.ceil(clips / each))


def of_shard(items: Sequence[Item], shard: Shard | None) -> Sequence[Item]:
    """The items of a shard: neighbours, as many as in any other or one less; without a shard all."""
    which, of = shard or (0, 1)
    return items[len(items) * which // of : len(items) * (which + 1) // of]


def most_clips(config: dict[str, Any], corpus: str) -> int:
    """The most clips that a corpus of the run can have, before it is drawn."""
    data = corpus_config(config, corpus)
    if data["source"] == "synthesis":
        return len(data["accents"]) * len(data["variants"]) * int(data["count"])
    if data["source"] in ("union", "mixture"):
        each = 2 if data["source"] == "mixture" else 1  # clean and noisy
        return each * sum(most_clips(config, name) for name in data["of"])
    return int(data["max_utterances"])


def sound_outputs(outputs: Any) -> tuple[Path, Any]:
    """The folder of sounds that a job of a stage's renders makes, and its table of signal scores; of a shard, whose
    mark is called after the folder, no table."""
    if MARK in outputs[0]:
        return whole(outputs[0]), None
    return Path(outputs.index).parent, outputs.signal


def whole(mark: str | Path) -> Path:
    """The file after which a shard's mark is called; of any other path itself."""
    return Path(str(mark).partition(MARK)[0])
