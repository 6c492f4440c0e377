"""What a speech LM is asked: sentences that it is told to say, or people who talk to it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.audio import read_audio, read_clip
from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.models.moshi.generate import Prompt
from eqknobs.models.moshi.likelihood import Said
from eqknobs.sound.judges import RATE, SpeakerEncoder
from eqknobs.speaking.clips import Clip, Sequences

VOICE_FRAMES = 25  # of the voice prompt: two seconds


@dataclass(frozen=True)
class Asked:
    """One prompt: what is given before the dialogue, and the user's codes [codebooks, T] in it.

    speaker: the voice that is asked for, or who talks; told: what the model is to say, where that is known; voice: the
    embedding of the voice in which it is to speak, where there is one.
    """

    id: str
    speaker: str
    prompt: Prompt
    user: Tensor
    told: str | None = None
    voice: np.ndarray | None = None


class Sentences:
    """Sentences that a model is told to say to a user who keeps silent, each in a voice of which it hears a clip.

    clips: whose sentences are told; known: clips of every voice, from which voice prompts are taken. Answers are a
    second longer than the longest clip. Raises EqknobsError if there are no clips, or none of a voice.
    """

    def __init__(self, model: Moshi, clips: Sequence[Clip], known: Sequence[Clip]) -> None:
        if not clips or {clip.voice for clip in clips} - {clip.voice for clip in known}:
            raise EqknobsError("speech LM: no clip of the part to be scored, or none of its voices to compare with")
        self.model, self.clips = model, list(clips)
        self.sequences = Sequences(list(known), model.tokeniser(), model.config)
        self.frames = max(clip.codes.shape[2] for clip in clips) + round(FRAME_RATE)

    def prompt(self, clip: Clip) -> Prompt:
        """The prompt of a voice and a sentence; which clip of the voice it is follows from the sentence."""
        voice = self.sequences.voice_codes(clip.voice, VOICE_FRAMES, random.Random(clip.text))
        return self.model.prompt(clip.text, voice)

    def asked(self, voices: Mapping[str, np.ndarray] | None = None) -> list[Asked]:
        """One prompt a clip. voices: the embedding of each voice."""
        user = torch.tensor(self.model.config.silence)[:, None].repeat(1, self.frames)
        voices = voices or {}
        return [
            Asked(f"{clip.voice}-{i:03d}", clip.voice, self.prompt(clip), user, clip.text, voices.get(clip.voice))
            for i, clip in enumerate(self.clips)
        ]

    def monologues(self) -> list[Tensor]:
        """The right text tokens [T] of each clip."""
        return [self.sequences.spoken(clip)[0] for clip in self.clips]

    def said(self, clips: Sequence[Clip]) -> list[Said]:
        """Clips as a model would say them that has learnt them, after their prompts."""
        config, rows = self.model.config, []
        for clip in clips:
            frames = self.sequences.spoken(clip)
            rows.append(Said(self.prompt(clip), frames[config.user], frames[0], frames[config.agent]))
        return rows


class Talk(TypedDict):
    """How people who talk to a model are answered: `seconds` of dialogue; a text prompt and a voice for the model (a
    `.pt` file of PersonaPlex or a recording), where it knows prompts."""

    seconds: float
    text: NotRequired[str | None]
    voice: NotRequired[str | None]


def conversations(model: Moshi, clips: pd.DataFrame, talk: Talk, encoder: SpeakerEncoder) -> list[Asked]:
    """One prompt a clip of a manifest, which is what the user says; silence follows it to the end."""
    frames, given = round(talk["seconds"] * FRAME_RATE), talk.get("voice")
    voice: str | np.ndarray | None = None
    embedding: np.ndarray | None = None
    if given is not None and Path(given).suffix == ".pt":
        voice = given
    elif given is not None:
        voice, embedding = read_audio(given, model.sample_rate), encoder.embed(read_audio(given, RATE))
    prompt, asked = model.prompt(talk.get("text"), voice), []
    for clip in clips.itertuples():
        heard = model.codes(read_clip(clip, model.sample_rate)[: frames * model.hop])[:, :frames]
        user = torch.tensor(model.config.silence)[:, None].repeat(1, frames)
        user[:, : heard.shape[1]] = heard
        asked.append(Asked(str(clip.id), str(clip.speaker), prompt, user, None, embedding))
    return asked
