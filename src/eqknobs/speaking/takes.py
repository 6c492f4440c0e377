"""Answers to hear side by side: sounds, and what was said and heard in them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from eqknobs.audio import write_flac
from eqknobs.io import atomic_path, write_csv
from eqknobs.speaking.answers import Answer
from eqknobs.speaking.prompts import Asked
from eqknobs.speaking.scores import Judge


class Take(NamedTuple):
    """One answer: what it was said under, its columns, what was asked and answered, the waveform [samples]."""

    condition: str
    columns: dict[str, Any]
    asked: Asked
    answer: Answer
    wav: np.ndarray


def write_takes(judge: Judge, takes: Iterable[Take], folder: Path) -> None:
    """A FLAC a take and `index.csv`: condition, its columns, id, speaker, text, said, heard, file."""
    rows: list[dict[str, Any]] = []
    with atomic_path(folder) as audio:
        audio.mkdir()
        for take in takes:
            heard = judge.transcriber.transcribe(judge.at_judges_rate(take.wav))
            file = f"{take.condition.replace(':', '_')}_{len(rows)}.flac"
            write_flac(audio / file, take.wav, judge.model.sample_rate)
            row = {"condition": take.condition, **take.columns, "id": take.asked.id, "speaker": take.asked.speaker}
            row |= {"text": take.asked.told or "", "said": judge.model.monologue(take.answer.text), "heard": heard}
            rows.append(row | {"file": file})
        write_csv(audio / "index.csv", pd.DataFrame(rows))
