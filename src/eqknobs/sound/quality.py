"""A judge of how speech sounds: DNSMOS P.835, a network that predicts what listeners would say of its quality.

It is a third judge for the stages that ask for it. What it is not: a listening test. It learnt from ratings of noisy
and denoised human speech (Reddy et al. 2022, arXiv 2110.01763), so that artefacts of codecs and synthetic voices are
strange to it, digital silence gets a middling mark, and a render's mark means something only beside that of its
untouched clip. It hears levels: do not compare sounds of different loudness.

On one core it costs about .2 s a window: up to 8 windows of a clip that is short, as those are doubled until they fill
one.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import soxr

from eqknobs.pieces import Pieces
from eqknobs.provenance import content
from eqknobs.sound.judges import RATE, Judge, package_folder, sound_hash, verified

DNSMOS_SHA256 = "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd"
SECONDS = 9.01  # that the network takes
WINDOW = int(SECONDS * RATE)  # samples
# The published calibration of the network's overall mark to listeners' (highest power first).
OVERALL = (-0.06766283, 1.11546468, 0.04602535)


class Quality(Judge):
    """DNSMOS P.835 with the weights in the package speechmos, on the CPU.

    pieces, workers: see `Judge`. Raises EqknobsError if the weights are not the pinned ones.
    """

    def __init__(self, pieces: Pieces | None = None, workers: int | None = None) -> None:
        super().__init__(pieces, workers)
        # The package's modules import librosa and pandas: 1.4 s for ten lines around this file.
        weights = package_folder("speechmos") / "dnsmos_models/sig_bak_ovr.onnx"
        self.weights = verified(weights, DNSMOS_SHA256, "speechmos")
        self.identity = [content(__file__), DNSMOS_SHA256, [version(name) for name in ("onnxruntime", "numpy")]]

    @cached_property
    def session(self) -> Any:
        """The loaded network."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(self.weights, options, providers=["CPUExecutionProvider"])

    def rate(self, wav: np.ndarray) -> float:
        """Predicted overall mean opinion score (1 bad … 5 excellent) of a clip float32 [samples] at 16 kHz.

        NaN for a clip without samples. Of a known sound, from `pieces`.
        """
        if not len(wav):
            return math.nan
        return self.pieces.json("quality", [*self.identity, sound_hash(wav)], lambda: self._rate(wav))

    def _rate(self, wav: np.ndarray) -> float:
        """As speechmos: a short clip is doubled until it fills a window, marks of a window a second are averaged."""
        wav = np.clip(wav, -1, 1).astype(np.float32)  # speechmos refuses what is beyond; resampling overshoots
        while len(wav) < WINDOW:
            wav = np.append(wav, wav)
        with self.loading:
            session = self.session
        raw = []
        for second in range(int(len(wav) // RATE - SECONDS) + 1):
            window = wav[second * RATE : int((second + SECONDS) * RATE)]
            if len(window) == WINDOW:  # rounding makes some a sample too short: the published judge skips them
                raw.append(session.run(None, {"input_1": window[None]})[0][0][2].item())
        return float(np.mean(np.polyval(OVERALL, raw)))


def dnsmos(sounds: Iterable[np.ndarray], rate: int, pieces: Pieces | None = None) -> list[float]:
    """`Quality.rate` of sounds float32 [samples] at `rate` samples/s, for stages that judge inside their own job."""
    judge = Quality(pieces)
    return [judge.rate(wav if rate == RATE else soxr.resample(wav, rate, RATE)) for wav in sounds]
