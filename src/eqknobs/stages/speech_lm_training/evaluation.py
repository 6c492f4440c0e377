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
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.audio import write_flac
from eqknobs.errors import EqknobsError
from eqknobs.evidence.stats import ratio_interval
from eqknobs.io import atomic_path, write_csv
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.models.moshi.generate import Sampling, generate
from eqknobs.models.moshi.interventions import zeroed_heads
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.sound.judges import SpeakerEncoder, Transcriber, similarity, word_errors
from eqknobs.stages.speech_lm_training.data import SPECIAL, Clip, Sequences, read_clips

VOICE_FRAMES = 25  # of the voice prompt: two seconds
# measure: numerator and denominator, summed over answers
MEASURES = {
    "wer_monologue": ("errors_monologue", "words_monologue"),
    "wer_prompt": ("errors_prompt", "words_prompt"),
    "codec_wer": ("errors_codec", "words_prompt"),
    "silent_share": ("silent", "one"),
    "endless_share": ("endless", "one"),
    "pad_share": ("pads", "frames"),
    "similarity_prompt": ("similarity_prompt", "one"),
    "similarity_other": ("similarity_other", "one"),
    "voice_right": ("voice_right", "one"),
}


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
    voices' mean embeddings are taken; cfg: asr, beam, batch (rows that are generated together) and temperature (of
    sound and text, where it samples). Raises EqknobsError if there are no clips.
    """

    def __init__(self, model: Moshi, clips: list[Clip], known: list[Clip], cfg: dict[str, Any]) -> None:
        if not clips or {clip.voice for clip in clips} - {clip.voice for clip in known}:
            raise EqknobsError("speech LM: no clip of the part to be scored, or none of its voices to compare with")
        self.model, self.clips, self.cfg = model, clips, cfg
        self.sequences = Sequences(known, model.tokeniser(), model.config)
        judge = {"asr": cfg["asr"], "beam": cfg["beam"], "device": "cpu"}
        self.transcriber, self.encoder = Transcriber(judge), SpeakerEncoder()
        self.frames = max(clip.codes.shape[2] for clip in clips) + round(FRAME_RATE)
        self.voices = {}
        for voice, said in sorted(self.sequences.by_voice.items()):
            embeddings = [self.encoder.embed(self.sound(torch.from_numpy(c.codes[0]).long())) for c in said[:8]]
            self.voices[voice] = np.mean(embeddings, axis=0) / np.linalg.norm(np.mean(embeddings, axis=0))
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
        clips, batch = self.clips[:count], self.cfg["batch"]
        for first in range(0, len(clips), batch):
            rows = clips[first : first + batch]
            prompts = []
            for clip in rows:
                voice = self.sequences.voice_codes(clip.voice, VOICE_FRAMES, random.Random(clip.text))
                prompts.append(self.model.prompt(clip.text, voice))
            user = torch.tensor(self.model.config.silence)[None, :, None].repeat(len(rows), 1, self.frames)
            text = None
            if forced:
                spoken = [self.sequences.spoken(clip)[0] for clip in rows]
                pad = self.model.config.pad
                text = torch.stack([torch.nn.functional.pad(t, (0, self.frames - len(t)), value=pad) for t in spoken])
            seeded = Sampling(**vars(sampling) | {"seed": sampling.seed + first})
            with inference():
                reply = generate(self.model.net, user.to(self.model.device), prompts, seeded, text)
            yield from zip(rows, reply.text.cpu(), reply.codes.cpu(), strict=True)

    def score(
        self, condition: str, seed: int, audio: Path | None = None, count: int | None = None
    ) -> list[dict[str, Any]]:
        """One record an answer, of the first `count` clips. audio: a folder for the sound of the first eight."""
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
            record = {"condition": condition, "seed": seed, "voice": clip.voice, "text": clip.text, "said": said}
            record |= dict(zip(("errors_monologue", "words_monologue"), word_errors(said, heard), strict=True))
            record |= dict(zip(("errors_prompt", "words_prompt"), word_errors(clip.text, said), strict=True))
            record |= {"heard": heard, "errors_codec": self.codec_errors[number], "one": 1, "frames": len(text)}
            record |= {"silent": int(not heard.strip() or not said), "pads": int((text == self.model.config.pad).sum())}
            record["endless"] = int((text[-round(FRAME_RATE) :] >= SPECIAL).any())
            alike, other = similarity(embedding, mine), max(others, default=np.nan)
            record |= {"similarity_prompt": alike, "similarity_other": other, "voice_right": float(alike > other)}
            records.append(record | {"seconds": seconds, "sound": len(wav) / self.model.sample_rate})
            if audio is not None and number < 8:
                write_flac(audio / f"{condition}_{seed}_{number}.flac", wav, self.model.sample_rate)
        return records


def table(answers: pd.DataFrame, model: str, split: str, draws: int) -> pd.DataFrame:
    """`speech_lm.csv` from one record an answer: a row for each condition, seeds together."""
    rows = []
    for condition, mine in answers.groupby("condition", sort=False):
        row = {"model": model, "split": split, "condition": condition, "seeds": mine["seed"].nunique()}
        row |= {"answers": len(mine), "speakers": mine["voice"].nunique()}
        for name, (top, bottom) in MEASURES.items():
            row[name] = mine[top].sum() / mine[bottom].sum() if mine[bottom].sum() else np.nan
        row["real_time_factor"] = mine["seconds"].sum() / mine["sound"].sum()
        for name, (top, bottom) in MEASURES.items():
            low, high = ratio_interval(mine[top], mine[bottom], list(mine["voice"]), draws)
            row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def evaluate(cfg: dict[str, Any], folder: str | Path, codes: str | Path, out_csv: str | Path) -> None:
    """Score the checkpoint in `folder` and write `speech_lm.csv`, one record an answer beside it, and some sound.

    cfg: speech (folder of clips), codec, scores (split, answers, zeroed_answers, conditions, seeds, draws, and those of
    `Speaker`): `zeroed_answers` for each seed of the conditions with heads zeroed, else `answers`; `intact` and
    `forced` have one seed.
    """
    scores, out_csv = cfg["scores"], Path(out_csv)
    model = Moshi({"name": "tiny-moshi", "path": str(folder), "codec": cfg["codec"], "device": "cpu"})
    parts = read_clips(cfg["speech"], codes)
    clips = parts[scores["split"]][: scores["answers"]]
    speaker = Speaker(model, clips, parts["train"], scores)
    records = []
    with atomic_path(out_csv.with_name("answers")) as audio:
        audio.mkdir()
        for condition in scores["conditions"]:
            for seed in range(1 if condition in ("intact", "forced") else scores["seeds"]):
                count = scores["zeroed_answers"] if condition.startswith("heads") else len(clips)
                folder = audio if condition == "intact" else None
                records += speaker.score(condition, seed, folder, count)
                print(table(pd.DataFrame(records[-count:]), "", "", 1).iloc[0, 2:15].to_dict(), flush=True)
    write_csv(out_csv.with_name("speech_lm_answers.csv"), pd.DataFrame(records))
    write_csv(out_csv, table(pd.DataFrame(records), model.name, scores["split"], scores["draws"]))
