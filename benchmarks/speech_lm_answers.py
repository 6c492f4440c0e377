"""How many seconds of answers a second a speech LM gives, sound included, one prompt a row, by batch size.

    python benchmarks/speech_lm_answers.py [--model FOLDER] [--seconds S] [--out FILE]

Greedy answers of S seconds to a silent user, each row after its own sentence of the grammar. Columns of
benchmarks/results/speech_lm_answers.csv: batch, threads, seconds (of sound, all rows), wall_s (median of three runs,
after a first), times_real_time, equal (whether every row says what it says alone), machine.
"""

import argparse
import random
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from eqknobs.io import output_file, write_csv
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.models.moshi.generate import Reply, generate
from eqknobs.speaking.grammar import sentence
from moshi_speed import machine

HERE = Path(__file__).resolve().parent


def answers(model: Moshi, texts: list[str], frames: int) -> Reply:
    """What the model says when told the texts, decoded to sound as well."""
    user = torch.tensor(model.config.silence)[None, :, None].repeat(len(texts), 1, frames)
    with inference():
        reply = generate(model.net, user, [model.prompt(text) for text in texts])
    for codes in reply.codes:
        model.speech(codes, frames * model.hop)
    return reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "resources/models/tiny-moshi")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=output_file, default=str(HERE / "results/speech_lm_answers.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Moshi({"name": "model", "kind": "moshi", "path": str(options.model), "device": "cpu"})
    frames, rng, rows = round(options.seconds * FRAME_RATE), random.Random(0), []
    for batch in options.batches:
        texts = [sentence(rng) for _ in range(batch)]
        walls = []
        for _ in range(4):
            begun = time.perf_counter()
            together = answers(model, texts, frames)
            walls.append(time.perf_counter() - begun)
        alone = [answers(model, [text], frames) for text in texts]
        equal = all(
            torch.equal(together.codes[i], one.codes[0]) and torch.equal(together.text[i], one.text[0])
            for i, one in enumerate(alone)
        )
        wall, sound = median(walls[1:]), batch * frames / FRAME_RATE
        rows.append((batch, 1, sound, round(wall, 3), round(sound / wall, 2), equal, machine()))
        print(rows[-1], flush=True)
    write_csv(
        options.out, pd.DataFrame(rows, columns="batch threads seconds wall_s times_real_time equal machine".split())
    )


if __name__ == "__main__":
    main()
