"""What is heard in an answer of a speech LM: words, voice, pitch, quality and the gates."""

from typing import Any, TypedDict

import numpy as np
import soxr
import torch

from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.pieces import Pieces
from eqknobs.sound.judges import RATE, JudgesCfg, SpeakerEncoder, Transcriber, normalise, similarity, word_errors
from eqknobs.sound.metrics import active_seconds, clip_f0
from eqknobs.sound.quality import Quality
from eqknobs.speaking.answers import Answer
from eqknobs.speaking.clips import Sequences
from eqknobs.speaking.gates import signal_values, token_values, word_values
from eqknobs.speaking.prompts import Asked


class JudgeCfg(TypedDict, total=False):
    """The recogniser, its beam and the seconds to which it pads an answer; whether quality is rated (DNSMOS), by
    default not."""

    asr: str
    beam: int
    answer_window: float
    dnsmos: bool


class Judge:
    """Judges answers, on the CPU. pieces: where transcripts, embeddings and marks are kept; by default nowhere."""

    def __init__(self, model: Moshi, cfg: JudgeCfg, pieces: Pieces | None = None) -> None:
        self.model = model
        asr = JudgesCfg(asr=cfg["asr"], beam=cfg["beam"], device="cpu")
        if "answer_window" in cfg:
            asr["window"] = cfg["answer_window"]
        self.transcriber = Transcriber(asr, pieces)
        self.encoder = SpeakerEncoder(pieces)
        self.quality = Quality(pieces) if cfg.get("dnsmos") else None

    def sound(self, answer: Answer) -> np.ndarray:
        """Waveform [samples] at the model's rate, of those codebooks that were said in all frames."""
        said = int((answer.codes >= 0).all(1).sum())  # the first ones
        return self.model.speech(answer.codes[:said], len(answer.text) * self.model.hop)

    def voices(self, sequences: Sequences) -> dict[str, np.ndarray]:
        """The mean embedding [256] of up to eight clips of each voice, through the codec."""
        found = {}
        for voice, clips in sorted(sequences.by_voice.items()):
            codes = [torch.from_numpy(clip.codes[0]).long() for clip in clips[:8]]
            sounds = [self.model.speech(one, one.shape[1] * self.model.hop) for one in codes]
            mean = np.mean([self.voice(wav) for wav in sounds], axis=0)
            found[voice] = mean / np.linalg.norm(mean)
        return found

    def at_judges_rate(self, wav: np.ndarray) -> np.ndarray:
        """The model's sound at the judges' rate."""
        rate = self.model.sample_rate
        return wav if rate == RATE else soxr.resample(wav, rate, RATE)

    def embed(self, answer: Answer) -> np.ndarray:
        """The voice of an answer [256]."""
        return self.voice(self.sound(answer))

    def voice(self, wav: np.ndarray) -> np.ndarray:
        """The voice of the model's sound [256]."""
        return self.encoder.embed(self.at_judges_rate(wav))

    def record(self, asked: Asked, answer: Answer, wav: np.ndarray | None = None, rated: bool = True) -> dict[str, Any]:
        """Everything about an answer that needs no other answer; what cannot be told of it is NaN.

        wav: its sound, if it is there; rated: by DNSMOS too, if this judge does so. Errors and words are counts
        (`word_errors`).
        """
        wav = self.at_judges_rate(self.sound(answer) if wav is None else wav)
        said, heard = self.model.monologue(answer.text), self.transcriber.transcribe(wav)
        record: dict[str, Any] = {"text": asked.told or "", "said": said, "heard": heard}
        record |= dict(zip(("errors_monologue", "words_monologue"), word_errors(said, heard), strict=True))
        told = (np.nan, np.nan) if asked.told is None else word_errors(asked.told, said)
        record |= dict(zip(("errors_prompt", "words_prompt"), told, strict=True))
        embedding = self.encoder.embed(wav)
        begin, end = active_seconds(wav, RATE)
        frames = len(answer.text)
        record |= {
            "frames": frames,
            "pad_frames": int((answer.text == self.model.config.pad).sum()),
            "silent": int(not heard.strip() or not said),
            "active_seconds": end - begin,
            "similarity_prompt": np.nan if asked.voice is None else similarity(embedding, asked.voice),
            "f0": clip_f0(wav, RATE),
            "dnsmos": self.quality.rate(wav) if self.quality and rated else np.nan,
            "seconds": frames / FRAME_RATE,
        }
        record |= signal_values(wav, RATE) | word_values(normalise(said), normalise(heard))
        return record | token_values(answer.text.numpy(), answer.codes.numpy(), self.model.config.pad)
