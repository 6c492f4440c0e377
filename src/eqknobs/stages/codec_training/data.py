"""The speech that a codec learns from, in memory."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eqknobs.audio import read_samples
from eqknobs.corpus.files import walk
from eqknobs.errors import EqknobsError


class Speech:
    """All speech below some folders in memory as 16-bit samples; one file in fifty is held out for validation.

    `shares` maps each folder to its share of the training crops. A file below two of the folders belongs to the inner
    one. Raises EqknobsError when a folder has no audio of its own, or a file has another rate than `rate` (Hz) or more
    than one channel.
    """

    def __init__(self, shares: dict[str, float], rate: int) -> None:
        owner: dict[Path, str] = {}
        for folder in sorted(shares, key=len):  # an inner folder's path is the longer one
            owner |= {p: folder for p in walk(Path(folder))[0] if p.suffix.lower() in (".wav", ".flac")}
        for folder in shares:
            if list(owner.values()).count(folder) < 2:
                raise EqknobsError(f"codec training: fewer than two .wav or .flac files below {folder}")
        files = sorted(owner)
        self.clips: list[np.ndarray] = []
        for path in files:
            audio, found = read_samples(path)  # float files too: read as integers, they would be silent
            if found != rate or audio.shape[1] != 1:
                raise EqknobsError(f"{path}: {found} Hz, {audio.shape[1]} channel(s); convert it to {rate} Hz mono")
            self.clips.append(np.clip(np.rint(audio[:, 0] * 32768), -32768, 32767).astype(np.int16))
        every = min(50, len(files))
        self.validation = self.clips[every - 1 :: every]
        kept = [i for i in range(len(self.clips)) if i % every != every - 1]
        self.training = [self.clips[i] for i in kept]
        owners = np.array([owner[files[i]] for i in kept])
        self.share = np.array([len(c) for c in self.training], dtype=np.float64)
        for folder, share in shares.items():
            mine = owners == folder
            self.share[mine] *= share / self.share[mine].sum() if mine.any() else 0.0
        self.share /= self.share.sum()
        self.minutes = sum(map(len, self.clips)) / rate / 60

    def batch(self, rng: np.random.Generator, size: int, samples: int, augment: float) -> Tensor:
        """Draws [size, 1, samples] float32 crops; within a folder a clip's chance is proportional to its length.

        `augment` is the share of crops played slower or faster by up to 20 % (which moves pitch and formants too).
        """
        crops = []
        for index in rng.choice(len(self.training), size, p=self.share):
            speed = rng.uniform(0.83, 1.2) if rng.random() < augment else 1.0
            crop = cut(self.training[index], rng.random(), round(samples * speed))
            crop = crop * 10 ** (rng.uniform(-6, 6) / 20)
            crops.append(F.interpolate(crop[None, None], samples, mode="linear")[0] if speed != 1.0 else crop[None])
        return torch.stack(crops)


def cut(clip: np.ndarray, where: float, samples: int) -> Tensor:
    """Returns `samples` float32 samples of a 16-bit clip starting at the share `where` of its range, zero-padded."""
    start = int(where * max(0, len(clip) - samples + 1))
    crop = torch.from_numpy(clip[start : start + samples].astype(np.float32) / 32768)
    return F.pad(crop, (0, samples - len(crop)))
