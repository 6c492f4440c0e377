"""What judging a sound costs, old way against new, side by side: CPU seconds a sound, and whether the words are equal.

usage: judging.py FOLDER [--sounds 40] [--out benchmarks/results/judging.csv]; FOLDER holds FLACs (a run's renders)

`as_before` lets the allocator give memory back after every operation; `kept` is what the judge does; `batch4` puts four
sounds through the encoder, or the decoder, at once. Each sound goes through all, in turn, so that a busy machine hits
all alike.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eqknobs.audio import read_audio
from eqknobs.io import output_file, write_csv
from eqknobs.sound import judges

# glibc's M_MMAP_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at their defaults
DEFAULTS = ((-4, 65536), (-3, 128 * 1024), (-1, 128 * 1024))


def decoder(whisper: Any) -> Callable[[np.ndarray], list[tuple[list[int], float]]]:
    """A function from encoder states to tokens and their log-probability, greedily."""
    from faster_whisper.tokenizer import Tokenizer
    from faster_whisper.transcribe import get_ctranslate2_storage, get_suppressed_tokens

    tokeniser = Tokenizer(whisper.hf_tokenizer, whisper.model.is_multilingual, task="transcribe", language="en")
    prompt = whisper.get_prompt(tokeniser, [], without_timestamps=True)
    suppressed = get_suppressed_tokens(tokeniser, [-1])
    options = {"beam_size": 1, "max_length": 100, "suppress_tokens": suppressed, "return_scores": True}

    def decode(states: np.ndarray) -> list[tuple[list[int], float]]:
        results = whisper.model.generate(get_ctranslate2_storage(states), [prompt] * len(states), **options)
        return [(result.sequences_ids[0], result.scores[0]) for result in results]

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sounds", type=int, default=40)
    parser.add_argument("--out", type=output_file, default="benchmarks/results/judging.csv")
    args = parser.parse_args()
    from faster_whisper.transcribe import pad_or_trim

    files = sorted(args.folder.rglob("*.flac"))
    files = files[:: max(1, len(files) // args.sounds)][: args.sounds]
    wavs = [read_audio(file, judges.RATE) for file in files]
    judge = judges.Transcriber({"asr": "tiny.en", "beam": 1, "device": "cpu"})
    whisper, decode = judge.model, decoder(judge.model)
    features = [pad_or_trim(whisper.feature_extractor(wav)[:, :-1]) for wav in wavs]
    mallopt = ctypes.CDLL(None).mallopt
    spent: dict[str, float] = dict.fromkeys(("as_before", "kept", "encode1", "encode4", "decode1", "decode4"), 0.0)
    words: dict[str, list[str]] = {"as_before": [], "kept": []}
    equal, said = True, {1: [], 4: []}
    for start in range(0, len(wavs), 4):
        for way in ("as_before", "kept"):
            if way == "kept":
                judges._keep_memory()
                judge._transcribe(wavs[start])  # the memory that is kept has to be had once
            else:
                for option, value in DEFAULTS:
                    mallopt(option, value)
            begun = time.process_time()
            words[way] += [judge._transcribe(wav) for wav in wavs[start : start + 4]]
            spent[way] += time.process_time() - begun
        group = np.stack(features[start : start + 4])
        whisper.encode(group)
        encoded: dict[int, np.ndarray] = {}
        for size in (1, 4):
            begun = time.process_time()
            parts = [np.array(whisper.encode(group[i : i + size])) for i in range(0, len(group), size)]
            encoded[size] = np.concatenate(parts)
            spent[f"encode{size}"] += time.process_time() - begun
            begun = time.process_time()
            said[size] += [one for i in range(0, len(group), size) for one in decode(encoded[1][i : i + size])]
            spent[f"decode{size}"] += time.process_time() - begun
        equal &= np.array_equal(encoded[1], encoded[4])
    same = words["as_before"] == words["kept"]
    rows = [
        (way, what, seconds / len(wavs), seconds / spent[against], agrees, len(wavs))
        for way, what, seconds, against, agrees in (
            ("as_before", "transcribe", spent["as_before"], "as_before", True),
            ("kept", "transcribe", spent["kept"], "as_before", same),
            ("batch1", "encode", spent["encode1"], "encode1", True),
            ("batch4", "encode", spent["encode4"], "encode1", bool(equal)),
            ("batch1", "decode", spent["decode1"], "decode1", True),
            ("batch4", "decode", spent["decode4"], "decode1", said[1] == said[4]),
        )
    ]
    columns = ["way", "what", "cpu_seconds_a_sound", "ratio", "equal", "sounds"]
    write_csv(args.out, pd.DataFrame(rows, columns=columns))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
