"""One vector an utterance: what a codec's decoder gets (or what an encoder's layer puts out), averaged over time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.models import Model
from eqknobs.pieces import Pieces

BLOCK = 64  # clips a piece of work
DECODER_INPUT, UNQUANTISED = "decoder_input", "unquantised"  # sites of a codec; of an encoder its own


@dataclass(frozen=True)
class Reading:
    """What is read of a model: `weights` trained or shuffled; codebooks 0 around the quantiser, and of an encoder."""

    weights: str
    site: str
    codebooks: int


class Reader:
    """Reads clips with one model, at the first `seconds` of each. `load` gives the model when it is first needed.

    encoder_site: a site of the model; readings of a codec go on from it to its decoder.
    """

    def __init__(self, load: Callable[[], Model], encoder_site: str, seconds: float):
        self._load, self.encoder_site, self.seconds = load, encoder_site, seconds
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = self._load()
        return self._model

    def wav(self, clip: Any) -> np.ndarray:
        """The start of a clip, mono, at the model's rate, [samples]."""
        return read_clip(clip, self.model.sample_rate)[: round(self.seconds * self.model.sample_rate)]

    def frames(self, wav: np.ndarray, readings: list[Reading]) -> Iterator[np.ndarray]:
        """[frames, width] of a waveform, reading by reading; no padding is among them but a codec's last hop."""
        acts = self.model.encode(wav, self.encoder_site)
        for reading in readings:
            if reading.site == self.encoder_site:
                yield acts
            else:
                yield self.model.decoder_input(acts, self.encoder_site, reading.codebooks or None)


def pool(
    reader: Reader, clips: pd.DataFrame, readings: list[Reading], pieces: Pieces
) -> tuple[dict[Reading, np.ndarray], pd.DataFrame]:
    """(reading -> u float32 [clips, width], a table of each clip's `loudness` in dB full scale and `duration` in s).

    pieces: the store, made of whatever decides the model.
    """
    parts: dict[Reading, list[np.ndarray]] = {reading: [] for reading in readings}
    scalars: list[np.ndarray] = []
    for start in tqdm(range(0, len(clips), BLOCK), desc="pooling", unit="block"):
        some = clips.iloc[start : start + BLOCK]

        def make(some: pd.DataFrame = some) -> dict[str, np.ndarray]:
            means: list[list[np.ndarray]] = [[] for _ in readings]
            told = []
            for clip in some.itertuples():
                wav = reader.wav(clip)
                power = float(np.mean(wav.astype(np.float64) ** 2))
                told.append([10 * np.log10(max(power, 1e-12)), len(wav) / reader.model.sample_rate])
                for found, frames in zip(means, reader.frames(wav, readings), strict=True):
                    found.append(frames.mean(0, dtype=np.float64).astype(np.float32))
            return {str(i): np.array(found) for i, found in enumerate(means)} | {"scalars": np.array(told)}

        asked = [[reading.site, reading.codebooks] for reading in readings]
        made_of = [list(some["sha256"]), reader.encoder_site, reader.seconds, asked]
        found = pieces.arrays("accent-pooled", made_of, make)
        scalars.append(found["scalars"])
        for i, reading in enumerate(readings):
            parts[reading].append(found[str(i)])
    table = pd.DataFrame(np.concatenate(scalars), columns=["loudness", "duration"])
    return {reading: np.concatenate(part) for reading, part in parts.items()}, table


def sample_frames(reader: Reader, clips: pd.DataFrame, reading: Reading, most: int) -> np.ndarray:
    """Frames of clips, in their order, until there are `most`: float32 [frames, width]."""
    found: list[np.ndarray] = []
    count = 0
    for clip in clips.itertuples():
        found.append(next(reader.frames(reader.wav(clip), [reading])))
        count += len(found[-1])
        if count >= most:
            break
    return np.concatenate(found)[:most]
