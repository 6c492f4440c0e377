"""Sound as a page holds it."""

import base64
import io
from collections.abc import Callable
from typing import Any

import librosa
import matplotlib
import numpy as np
import pandas as pd
import soundfile as sf
from PIL import Image

from eqknobs.evidence.stage import Context
from eqknobs.io import require_renders


def mp3(wav: np.ndarray, rate: int) -> bytes:
    """Mono MP3 of about 65 kbit/s of a waveform [samples], which every browser and phone plays."""
    level = 0.65 if rate <= 24000 else 0.9  # of the bitrates that MPEG offers at this rate
    buffer = io.BytesIO()
    sf.write(buffer, wav, rate, "MPEG_LAYER_III", format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    return buffer.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """`content` as an address that a page holds itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def side_by_side(
    at: Context,
    folder: str,
    title: Callable[[dict[str, Any]], str],
    rank: Callable[[dict[str, Any]], int] = lambda row: 0,
) -> list[dict[str, Any]]:
    """A speech LM's answers to the same prompts: [{told, speaker, takes: [{name, said, heard, sound}]}].

    folder: below the model's renders, as `eqknobs.speaking.takes` writes it; title: of a row of its index; rank: by
    which takes are sorted, rows of one rank as the index has them. Raises EqknobsError for a sound that is gone.
    """
    name = f"renders/{at.target}/{folder}/index.csv"
    index, beside = at.inputs.csv(name), at.inputs.path(name).parent
    require_renders(beside / "index.csv", index["file"])
    found = []
    for _, rows in index.groupby("id", sort=False):
        takes = []
        for row in sorted(rows.to_dict("records"), key=rank):
            wav, rate = sf.read(beside / row["file"], dtype="float32")
            said, heard = ("" if pd.isna(row[key]) else row[key] for key in ("said", "heard"))
            sound = data_uri("audio/mpeg", mp3(wav, rate))
            takes.append({"name": title(row), "said": said, "heard": heard, "sound": sound})
        told = "" if pd.isna(rows["text"].iloc[0]) else rows["text"].iloc[0]
        found.append({"told": told, "speaker": rows["speaker"].iloc[0], "takes": takes})
    return found


def spectrogram(wav: np.ndarray, rate: int, peak: float) -> bytes:
    """Mel spectrogram of a waveform [samples], 80 dB below `peak` (`loudest_band`), as a JPEG."""
    level = np.clip((10 * np.log10(_mel(wav, rate) + 1e-12) - peak) / 80 + 1, 0, 1)
    return magma(level[::-1], (min(640, level.shape[1] * 2), 144))


def loudest_band(wav: np.ndarray, rate: int) -> float:
    """The largest mel power of a waveform [samples], dB."""
    return float(10 * np.log10(_mel(wav, rate).max() + 1e-12))


def magma(level: np.ndarray, size: tuple[int, int]) -> bytes:
    """Levels 0…1 [rows, columns] in colours, scaled to size (width, height), as a JPEG."""
    pixels = (matplotlib.colormaps["magma"](level)[..., :3] * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=72)
    return buffer.getvalue()


def _mel(wav: np.ndarray, rate: int) -> np.ndarray:
    return librosa.feature.melspectrogram(y=wav, sr=rate, n_fft=1024, hop_length=rate // 100, n_mels=96)
