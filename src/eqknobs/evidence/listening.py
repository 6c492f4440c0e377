"""Sound as a page holds it."""

import base64
import io

import librosa
import matplotlib
import numpy as np
import soundfile as sf
from PIL import Image


def mp3(wav: np.ndarray, rate: int) -> bytes:
    """Mono MP3 of about 65 kbit/s of a waveform [samples], which every browser and phone plays."""
    level = 0.65 if rate <= 24000 else 0.9  # of the bitrates that MPEG offers at this rate
    buffer = io.BytesIO()
    sf.write(buffer, wav, rate, "MPEG_LAYER_III", format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    return buffer.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """`content` as an address that a page holds itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
