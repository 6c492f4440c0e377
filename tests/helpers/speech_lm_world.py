"""Speech with word times without a synthesiser: every word is a tone of its own."""

import json
import random
from pathlib import Path

import numpy as np
import soundfile as sf

from eqknobs.speaking.grammar import part_of, sentence, words
from helpers import ROOT

FRAME, RATE = 1280, 16000  # samples a code frame of tiny-mimi; Hz
PARTS = {"train": 16, "val": 2, "test": 4}  # clips
SIZES = {"dim": 32, "layers": 2, "heads": 2, "hidden": 64, "dep_dim": 16, "dep_layers": 1, "dep_heads": 2}
SIZES |= {"dep_hidden": 32, "context": 100, "codebooks": 8}
CODEC = ROOT / "resources/models/tiny-mimi"


def write_speech(folder: Path) -> Path:
    """Clips of two voices, low and high, with sentences of every part; a word lasts two frames."""
    rng, left, number = random.Random(0), dict(PARTS), 0
    while any(left.values()):
        text = sentence(rng)
        if not left[part_of(text)]:
            continue
        left[part_of(text)] -= 1
        voice, pitch = (("low", 1.0), ("high", 1.5))[number % 2]
        frames = [5 + 2 * i for i in range(len(text.split()) + 1)]
        wav = np.zeros((frames[-1] + 6) * FRAME)
        for word, begin in zip(text.split(), frames):
            tone = pitch * (100 + 5 * words().index(word))
            wav[begin * FRAME : (begin + 2) * FRAME] = 0.2 * np.sin(2 * np.pi * tone * np.arange(2 * FRAME) / RATE)
        path = folder / voice / f"{number:03d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, wav, RATE)
        path.with_suffix(".json").write_text(json.dumps({"text": text, "frames": frames}))
        number += 1
    return folder
