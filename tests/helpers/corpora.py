"""Corpora of noise in the layouts that the manifest knows."""

import hashlib
from pathlib import Path

import numpy as np
import soundfile as sf

CFG = {
    "source": "folder",
    "labels": None,
    "max_utterances": 1000,
    "max_minutes": 1000,
    "min_seconds": 0.5,
    "max_seconds": 20.0,
    "splits": {"train": 0.5, "val": 0.25, "test": 0.25},
}


def clip(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1, level: float = 0.1) -> Path:
    """Noise of its own for each path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(hashlib.sha256(path.name.encode() + bytes(path.parent)).hexdigest()[:8], 16))
    sf.write(path, level * rng.uniform(-1, 1, (round(seconds * rate), channels)), rate)
    return path


def librispeech(root: Path, speakers: int = 8, clips: int = 3, extra: str = "") -> Path:
    """A corpus in LibriSpeech's layout, speakers 10…, women on even numbers."""
    lines = ["; comment", ";ID  |SEX| SUBSET |MINUTES| NAME"]
    for speaker in range(10, 10 + speakers):
        lines.append(f"{speaker}   | {'FM'[speaker % 2]} | dev-clean | 8.0 | Reader, {speaker}")
        folder = root / "LibriSpeech" / "dev-clean" / str(speaker) / "77"
        names = [f"{speaker}-77-{i:04d}{extra}" for i in range(clips)]
        for name in names:
            clip(folder / f"{name}.flac")
        (folder / f"{speaker}-77.trans.txt").write_text("".join(f"{n} HELLO FROM {n}\n" for n in names))
    (root / "LibriSpeech" / "SPEAKERS.TXT").write_text("\n".join(lines) + "\n")
    return root
