"""From speech with word times to the sequences of tokens that a small Moshi learns from.

A clip is a sound file with a JSON file beside it: `text`, and `frames`, the code frame in which each word begins and,
last, the one in which the speech has ended. The folder it lies in is its voice. The monologue has one token a word,
`LEAD` frames before its sound, and EPAD just before it where there is room (Défossez et al. 2024, section 3.4.4).
"""

import io
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile as sf
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_json
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.models.moshi.generate import persona_prompt, system_text
from eqknobs.models.moshi.loudness import normalised
from eqknobs.models.moshi.monologue import monologue
from eqknobs.speaking import grammar

LEAD = 2  # frames that the monologue runs ahead of the sound
CUT = 2  # frames of silence dropped in front of a clip: a codec's first frames are not its steady silence
SPECIAL = 4  # the tokeniser's first tokens: 0 unknown, which is EPAD too, 1 and 2 unused, 3 PAD


@dataclass(frozen=True)
class Clip:
    """One spoken sentence: `codes` [levels, codebooks, T], the same sound at several levels."""

    voice: str
    text: str
    frames: tuple[int, ...]
    codes: np.ndarray


def codes_of(codec: Mimi, wav: np.ndarray, codebooks: int) -> np.ndarray:
    """Codes int16 [codebooks, T] of a waveform [samples] at the codec's rate."""
    latents = codec.encode(wav.astype(np.float32), "encoder_transformer")
    return np.asarray(codec.tokens(latents, "encoder_transformer", codebooks)).astype(np.int16)


def sounds(codec: Mimi, codebooks: int) -> dict[str, tuple[int, ...]]:
    """A codec's steady codes of silence and of PersonaPlex's sine of 440 Hz (one frame's, where they cycle)."""
    rate = codec.sample_rate
    waves = {"silence": np.zeros(4 * rate), "sine": 0.1 * np.sin(2 * np.pi * 440 * np.arange(4 * rate) / rate)}
    return {name: tuple(map(int, codes_of(codec, wave, codebooks)[:, -3])) for name, wave in waves.items()}


def encode_speech(folder: str | Path, out: str | Path, codec: Mimi, codebooks: int, levels: int, seed: int) -> int:
    """Write the codes of all clips below `folder` to `out` (.npz), keeping those that are there; returns their number.

    Each clip is heard at -24 LUFS, as a voice prompt is, and `levels` - 1 times up to 6 dB louder or softer. Raises
    EqknobsError where there is no clip, or one at another rate than the codec's.
    """
    out = Path(out)
    with np.load(out) if out.exists() else np.load(_nothing()) as stored:
        done = {key: stored[key] for key in stored.files}
    for path in sorted(Path(folder).glob("*/*.json")):
        key = f"{path.parent.name}/{path.stem}"
        if key in done:
            continue
        wav, rate = sf.read(path.with_suffix(".flac"), dtype="float32")
        if rate != codec.sample_rate or wav.ndim != 1:
            raise EqknobsError(f"{path.with_suffix('.flac')}: {rate} Hz; convert it to {codec.sample_rate} Hz mono")
        wav, rng = normalised(wav, rate), random.Random(f"{seed}-{key}")
        gains = [0.0] + [rng.uniform(-6, 6) for _ in range(levels - 1)]
        done[key] = np.stack([codes_of(codec, wav * 10 ** (gain / 20), codebooks) for gain in gains])
    if not done:
        raise EqknobsError(f"{folder}: no clips in it (<voice>/<name>.flac and .json); see docs/tiny-moshi.md")
    with atomic_path(out) as temporary:
        np.savez(temporary.with_suffix(".npz"), **done)
    return len(done)


def _nothing() -> io.BytesIO:
    buffer = io.BytesIO()
    np.savez(buffer)
    buffer.seek(0)
    return buffer


def read_clips(folder: str | Path, codes: str | Path) -> dict[str, list[Clip]]:
    """All encoded clips in the order of their names, by the part that their sentence belongs to."""
    parts: dict[str, list[Clip]] = {"train": [], "val": [], "test": []}
    with np.load(codes) as stored:
        for key in sorted(stored.files, key=lambda key: key.split("/")[::-1]):
            facts = read_json(Path(folder) / f"{key}.json")
            clip = Clip(key.partition("/")[0], facts["text"], tuple(facts["frames"]), stored[key])
            parts[grammar.part_of(clip.text)].append(clip)
    return parts


def write_tokeniser(path: str | Path) -> None:
    """A sentencepiece model with one token for each word of the grammar and one for `<system>`."""
    words, model = grammar.words(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"<system> {word} <system>" for word in words]),
        model_writer=model,
        model_type="word",
        vocab_size=len(words) + 1 + SPECIAL,
        use_all_vocab=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.getvalue())


class Sequences:
    """Makes sequences [streams, T] and the number of frames in front of them that are a prompt, from clips and words.

    Everything random comes from the generator that is handed in.
    """

    def __init__(self, clips: list[Clip], tokeniser: sentencepiece.SentencePieceProcessor, config: MoshiConfig) -> None:
        self.clips, self.tokeniser, self.config = clips, tokeniser, config
        self.words = grammar.words()
        self.by_voice: dict[str, list[Clip]] = defaultdict(list)
        self.durations: dict[str, list[int]] = defaultdict(list)  # frames from a word to the next
        for clip in clips:
            self.by_voice[clip.voice].append(clip)
            for word, begin, end in zip(clip.text.split(), clip.frames, clip.frames[1:], strict=False):
                self.durations[word].append(end - begin)

    def monologue(self, text: str, starts: list[int], frames: int) -> Tensor:
        """Text tokens [frames]: word i at starts[i] or, if that is taken, as soon as possible."""
        tokens = self.tokeniser.encode(text)
        if len(tokens) != len(starts) or 0 in tokens:
            raise EqknobsError(f"speech LM: {text!r} has words without a token, or not one start a word")
        return monologue([[token] for token in tokens], starts, frames, self.config)

    def spoken(self, clip: Clip, level: int = 0) -> Tensor:
        """Frames [streams, T] of a clip that the agent says to a silent user."""
        codes = torch.from_numpy(clip.codes[level, :, CUT:].astype(np.int64))
        out = torch.empty(self.config.streams, codes.shape[1], dtype=torch.long)
        out[0] = self.monologue(clip.text, [f - CUT - LEAD for f in clip.frames[:-1]], codes.shape[1])
        out[self.config.agent], out[self.config.user] = codes, torch.tensor(self.config.silence)[:, None]
        return out

    def prompt(self, text: str | None, voice: Tensor | None) -> Tensor:
        """PersonaPlex's prompt [streams, P]; nothing if there is neither text nor voice."""
        if text is None and voice is None:
            return torch.empty(self.config.streams, 0, dtype=torch.long)
        tokens = None if text is None else self.tokeniser.encode(system_text(text))
        frames = persona_prompt(tokens, self.config, voice_codes=voice).frames
        assert frames is not None
        return frames

    def voice_codes(self, voice: str, frames: int, rng: random.Random) -> Tensor:
        """The first frames of some clip of a voice, from where it begins to speak [codebooks, frames]."""
        clip = rng.choice(self.by_voice[voice])
        begin = clip.frames[0] - 1
        return torch.from_numpy(clip.codes[0, :, begin : begin + frames].astype(np.int64))

    def draw(self, clip: Clip, voice_frames: int, rng: random.Random) -> tuple[Tensor, int]:
        """A training sequence of a clip, with up to 15 frames of silence behind it, so that the agent learns to end.

        Mostly with its text as prompt; a sixth with somebody else talking.
        """
        quiet = torch.empty(self.config.streams, rng.choice((0, rng.randrange(16))), dtype=torch.long)
        quiet[0], quiet[self.config.agent.start :] = self.config.pad, torch.tensor(2 * self.config.silence)[:, None]
        frames = torch.cat([self.spoken(clip, rng.randrange(len(clip.codes))), quiet], 1)
        if rng.random() < 1 / 6:
            other = torch.from_numpy(rng.choice(self.clips).codes[0].astype(np.int64))[:, : frames.shape[1]]
            frames[self.config.user, : other.shape[1]] = other
        voice = self.voice_codes(clip.voice, voice_frames, rng) if voice_frames else None
        prompt = self.prompt(clip.text if rng.random() < 0.88 else None, voice)
        return torch.cat([prompt, frames], 1), prompt.shape[1]

    def copying(self, rng: random.Random, ease: float) -> tuple[Tensor, int]:
        """A sequence without sound: words of the prompt said again.

        ease 1: random words, one in every frame; 0: as far apart as in speech, half of them sentences of the grammar.
        """
        if rng.random() < 0.5 * (1 - ease):
            text = grammar.sentence(rng)
            while grammar.part_of(text) != "train":
                text = grammar.sentence(rng)
        else:
            text = " ".join(rng.sample(self.words, rng.randint(5, 11)))
        loose = rng.random() > ease
        starts, at = [], 1
        for word in text.split():
            starts.append(at)
            at += rng.choice(self.durations.get(word, [4])) if loose else 1
        frames = torch.full((self.config.streams, at + rng.randint(3, 15)), -1)
        frames[self.config.user] = torch.tensor(self.config.silence)[:, None]
        frames[0] = self.monologue(text, starts, frames.shape[1])
        prompt = self.prompt(text, None)
        return torch.cat([prompt, frames], 1), prompt.shape[1]


def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Rows padded with -1 to [B, streams, T], and which frames are dialogue [B, T]."""
    longest = max(frames.shape[1] for frames, _ in rows)
    codes = torch.full((len(rows), rows[0][0].shape[0], longest), -1)
    dialogue = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (frames, prompt) in enumerate(rows):
        codes[row, :, : frames.shape[1]] = frames
        dialogue[row, prompt : frames.shape[1]] = True
    return codes, dialogue
