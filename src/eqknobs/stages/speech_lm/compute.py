"""What a small Moshi says when it is told sentences that it was not trained on, judged by a recogniser.

Every answer is generated after a prompt of a voice and a sentence, to a user who keeps silent, in batches with one
prompt a row. Conditions: `intact` (the likeliest tokens), `sampled`, `forced` (the right monologue given: how clearly
it speaks, apart from what it says) and `heads_zeroed_<share>`, that share of the temporal transformer's heads, drawn at
random by the seed. The speaker of an answer is the voice that the prompt asks for.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.audio import write_flac
from eqknobs.errors import counted
from eqknobs.io import atomic_path, write_csv
from eqknobs.models import ModelCfg
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.models.moshi.generate import Sampling
from eqknobs.models.moshi.interventions import zeroed_heads
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.pieces import Pieces
from eqknobs.sound.judges import similarity, word_errors
from eqknobs.speaking.answers import speak
from eqknobs.speaking.clips import SPECIAL, Clip, encode_speech, read_clips
from eqknobs.speaking.prompts import Sentences
from eqknobs.speaking.scores import Judge

LISTED = 8  # answers of a condition whose sound is kept, where it is


class SpeakerCfg(TypedDict):
    """What `Speaker` reads."""

    asr: str  # and `beam`: the judge's
    beam: int
    batch: int  # rows that are generated together
    temperature: float  # of sound and text, where it samples


class ScoresCfg(SpeakerCfg):
    """What is said: the sections `speech_lm` and `judges`, or `speech_lm_training.scores`."""

    split: str  # val | test
    answers: int
    zeroed_answers: int  # of the conditions with heads zeroed
    conditions: list[str]
    seeds: int  # of the conditions that draw


class AnswersCfg(ScoresCfg):
    """What `answer_sentences` reads."""

    model: ModelCfg
    speech: str  # a folder of clips, see `speaking.clips`


@contextmanager
def random_heads_zeroed(net: MoshiNet, share: float, seed: int) -> Iterator[None]:
    """While the block runs, a share of all heads of the temporal transformer, drawn by the seed, gives zeros."""
    every = [(layer, head) for layer, left in enumerate(net.heads) for head in left]
    chosen: dict[int, list[int]] = {}
    for layer, head in random.Random(seed).sample(every, round(share * len(every))):
        chosen.setdefault(layer, []).append(head)
    with zeroed_heads(net, chosen):
        yield


class Speaker:
    """Lets a model say held-out sentences, and judges what it says.

    clips: those of the part whose sentences are said; known: clips of every voice, from which voice prompts and the
    voices' mean embeddings are taken. Raises EqknobsError if there are no clips.
    """

    def __init__(
        self, model: Moshi, clips: list[Clip], known: list[Clip], cfg: SpeakerCfg, pieces: Pieces | None = None
    ) -> None:
        self.model, self.clips, self.cfg = model, clips, cfg
        self.told = Sentences(model, clips, known)
        judge = Judge(model, {"asr": cfg["asr"], "beam": cfg["beam"]}, pieces)
        self.transcriber, self.encoder = judge.transcriber, judge.encoder
        self.voices = judge.voices(self.told.sequences)
        self.codec_errors = [self.heard(torch.from_numpy(clip.codes[0]).long(), clip.text)[0] for clip in clips]

    def sound(self, codes: Tensor) -> np.ndarray:
        """Waveform [samples] of codes [codebooks, T]."""
        return self.model.speech(codes, codes.shape[1] * self.model.hop)

    def heard(self, codes: Tensor, text: str) -> tuple[int, int]:
        """Word errors of what the recogniser hears in codes against a text, and that text's words."""
        return word_errors(text, self.transcriber.transcribe(self.sound(codes)))

    def answers(
        self, sampling: Sampling, forced: bool = False, count: int | None = None
    ) -> Iterator[tuple[Clip, Tensor, Tensor]]:
        """The first `count` clips with the text tokens [T] and codes [codebooks, T] that the model makes of them."""
        asked = self.told.asked()[:count]
        texts = self.told.monologues()[:count] if forced else None
        answers = speak(self.model, asked, sampling, self.cfg["batch"], texts)
        for clip, answer in zip(self.clips[:count], answers, strict=True):
            yield clip, answer.text, answer.codes

    def score(
        self, condition: str, seed: int, audio: Path | None = None, count: int | None = None
    ) -> list[dict[str, Any]]:
        """One record an answer, of the first `count` clips. audio: a folder for the sound of the first `LISTED`."""
        share = float(condition.removeprefix("heads_zeroed_")) if condition.startswith("heads_zeroed_") else 0.0
        heat = self.cfg["temperature"] if condition == "sampled" else 0.0
        sampling = Sampling(temperature=heat, text_temperature=heat, seed=1000 * seed)
        with random_heads_zeroed(self.model.net, share, seed):
            begun = time.perf_counter()
            answers = list(self.answers(sampling, condition == "forced", count))
            sounds = [self.sound(codes) for _, _, codes in answers]
            seconds = (time.perf_counter() - begun) / len(answers)
        records = []
        for number, ((clip, text, _), wav) in enumerate(zip(answers, sounds, strict=True)):
            said, heard = self.model.monologue(text), self.transcriber.transcribe(wav)
            mine, embedding = self.voices[clip.voice], self.encoder.embed(wav)
            others = [similarity(embedding, voice) for name, voice in self.voices.items() if name != clip.voice]
            record = {
                "id": f"{condition}-{seed}-{number}",
                "condition": condition,
                "seed": seed,
                "speaker": clip.voice,
                "text": clip.text,
                "said": said,
            }
            record |= dict(zip(("errors_monologue", "words_monologue"), word_errors(said, heard), strict=True))
            record |= dict(zip(("errors_prompt", "words_prompt"), word_errors(clip.text, said), strict=True))
            record |= {"heard": heard, "errors_codec": self.codec_errors[number], "one": 1, "frames": len(text)}
            record |= {"silent": int(not heard.strip() or not said), "pads": int((text == self.model.config.pad).sum())}
            record["endless"] = int((text[-round(FRAME_RATE) :] >= SPECIAL).any())
            alike, other = similarity(embedding, mine), max(others, default=np.nan)
            record |= {"similarity_prompt": alike, "similarity_other": other, "voice_right": float(alike > other)}
            records.append(record | {"seconds": seconds, "sound": len(wav) / self.model.sample_rate})
            if audio is not None and number < LISTED:
                name = f"{condition}_{seed}_{number}.flac"
                write_flac(audio / name, wav, self.model.sample_rate)
                records[-1]["file"] = name
        return records


def answer_sentences(
    cfg: AnswersCfg, out_csv: str | Path, out_dir: str | Path, codes: str | Path, pieces: Pieces | None = None
) -> None:
    """Let a model say held-out sentences: one record an answer in `out_csv`, the sound of some in `out_dir`.

    codes: the clips' codes (.npz); what is not there is encoded and added. `intact` and `forced` have one seed. The
    sound of the first answers of `intact` is kept. out_dir appears only when it is whole.
    """
    model = Moshi(cfg["model"])
    encode_speech(cfg["speech"], codes, model.codec, model.config.codebooks, levels=1, seed=0)
    parts = read_clips(cfg["speech"], codes)
    clips = parts[cfg["split"]][: cfg["answers"]]
    speaker = Speaker(model, clips, parts["train"], cfg, pieces)
    records: list[dict[str, Any]] = []
    about = {"model": model.name, "split": cfg["split"]}
    with atomic_path(Path(out_dir)) as audio:
        audio.mkdir()
        for condition in cfg["conditions"]:
            for seed in range(1 if condition in ("intact", "forced") else cfg["seeds"]):
                count = cfg["zeroed_answers"] if condition.startswith("heads") else len(clips)
                records += speaker.score(condition, seed, audio if condition == "intact" else None, count)
                print(f"{condition}, seed {seed}: {counted(min(count, len(clips)), 'answer')}", flush=True)
        table = pd.DataFrame(about | record for record in records)
        kept = table[table["file"].notna()] if "file" in table else table.head(0)
        write_csv(
            audio / "index.csv", kept.reindex(columns=["id", "condition", "speaker", "text", "said", "heard", "file"])
        )
    write_csv(out_csv, table.drop(columns="file", errors="ignore"))
