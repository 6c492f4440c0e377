"""What a run's judges say of its sounds: transcripts of untouched clips; words, voice and quality of renders.

One job judges all renders of a run with judges that are loaded once, as many sounds at a time as it has cores. What is
known of a sound (`eqknobs.pieces`) is not judged again, so that making all tables anew costs little.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eqknobs.audio import read_audio, read_clip
from eqknobs.device import gpu_lock
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, require_renders, write_csv
from eqknobs.pieces import Pieces
from eqknobs.shards import Shard, of_shard
from eqknobs.sound.judges import RATE, JudgesCfg, SpeakerEncoder, Transcriber, similarity, text_errors, word_errors
from eqknobs.sound.quality import Quality

ORIGINALS = "id speaker split transcript text words_text errors_text".split()
WORDS = "id speaker split condition transcript words errors words_text errors_text speaker_similarity".split()


@dataclass(frozen=True)
class Renders:
    """Renders of one target by one stage, and where what is judged of them goes (CSV paths)."""

    index: str | Path  # of `render_conditions`; the FLACs that it marks `judged` are judged
    originals: str | Path  # transcripts of the clips by `judge_originals`
    manifest: str | Path
    out: str | Path
    quality: bool = False  # whether to rate them by DNSMOS


def judge_originals(
    manifest_csv: str | Path,
    out_csv: str | Path,
    cfg: JudgesCfg,
    pieces: Pieces | None = None,
    workers: int = 1,
    shard: Shard | None = None,
) -> None:
    """Transcribe the untouched test clips, `workers` at a time. cfg, pieces: see `Transcriber`. With `shard` only some
    of them, for the pieces.

    CSV: id, speaker, split, transcript, text, words_text, errors_text (of the transcript against the corpus text; empty
    where there is none).
    """
    manifest = read_csv(manifest_csv)
    clips = of_shard(list(manifest[manifest["split"] == "test"].sort_values("id").itertuples()), shard)
    transcriber = Transcriber(cfg, pieces, workers)

    def judge(clip: Any) -> tuple:
        transcript = transcriber.transcribe(read_clip(clip, RATE))
        errors, words = text_errors(clip.text, transcript)
        return clip.id, clip.speaker, clip.split, transcript, clip.text, words, errors

    with _pool(transcriber.device, workers) as pool:
        rows = _each(pool, judge, clips, "transcribe originals")
    if shard is None:
        write_csv(out_csv, pd.DataFrame(rows, columns=ORIGINALS))


def judge_renders(
    renders: Sequence[Renders],
    cfg: JudgesCfg,
    pieces: Pieces | None = None,
    workers: int = 1,
    shard: Shard | None = None,
) -> None:
    """Judge renders with judges that are loaded once, `workers` at a time. cfg, pieces: see `Transcriber`. With `shard`
    only some of each, for the pieces.

    CSV: id, speaker, split, condition, transcript, words, errors (against the transcript of the untouched clip),
    words_text, errors_text (against the corpus text), speaker_similarity (to the untouched clip), and dnsmos where it
    is asked for (see `Quality`). Raises EqknobsError if a render is gone, or its clip has no transcript.
    """
    tables = [(one, of_shard(_sounds(one), shard)) for one in renders]  # what is missing ends the job before the work
    transcriber, encoder = Transcriber(cfg, pieces, workers), SpeakerEncoder(pieces, workers)
    quality = Quality(pieces, workers) if any(one.quality for one in renders) else None
    voices: dict[str, np.ndarray] = {}  # of untouched clips, by the hash of their file

    def hear(clip: Any) -> np.ndarray:
        return encoder.embed(read_clip(clip, RATE))

    def judge(sound: _Sound) -> tuple:
        wav, clip, original = read_audio(sound.file, RATE), sound.clip, sound.original
        transcript, voice = transcriber.transcribe(wav), encoder.embed(wav)
        errors, words = word_errors(original["transcript"], transcript)
        errors_text, words_text = text_errors(original["text"], transcript)
        about = (clip.id, original["speaker"], original["split"], sound.condition, transcript)
        scores = (words, errors, words_text, errors_text, similarity(voices[clip.sha256], voice))
        return (*about, *scores, quality.rate(wav) if quality and sound.rated else None)

    with _pool(transcriber.device, workers) as pool:
        for one, sounds in tables:
            clips = {sound.clip.sha256: sound.clip for sound in sounds if sound.clip.sha256 not in voices}
            voices |= zip(clips, _each(pool, hear, clips.values(), "hear untouched clips"))
            rows = _each(pool, judge, sounds, f"judge {Path(one.out).name}")
            if shard:
                continue
            table = pd.DataFrame(rows, columns=[*WORDS, "dnsmos"])
            write_csv(one.out, table if one.quality else table[WORDS])


@dataclass(frozen=True)
class _Sound:
    """A render that is to be judged."""

    file: Path
    condition: str
    clip: Any  # its row of the manifest
    original: dict[str, Any]  # its row of the transcripts of untouched clips
    rated: bool


def _sounds(renders: Renders) -> list[_Sound]:
    index = read_csv(renders.index)
    index = index[index["judged"].astype(bool)]
    require_renders(renders.index, index["file"])
    originals = {row["id"]: row for row in read_csv(renders.originals).to_dict("records")}
    clips = {clip.id: clip for clip in read_csv(renders.manifest).itertuples()}
    missing = sorted(set(index["id"]) - set(originals))
    if missing:
        raise EqknobsError(f"{renders.originals} has no transcript of {missing[0]}; remove the file and run again")
    folder = Path(renders.index).parent
    return [
        _Sound(folder / row.file, row.condition, clips[row.id], originals[row.id], renders.quality)
        for row in index.itertuples()
    ]


@contextmanager
def _pool(device: str, workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of `workers` sounds, a core each."""
    with gpu_lock(device), threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        yield pool


def _each(pool: ThreadPoolExecutor, judge: Callable[[Any], Any], sounds: Collection[Any], what: str) -> list[Any]:
    """What `judge` says of each sound, in their order."""
    try:
        return list(tqdm(pool.map(judge, sounds), desc=what, total=len(sounds), unit="clip", disable=not sounds))
    except BaseException:  # what waits is not to be judged before the job ends
        pool.shutdown(cancel_futures=True)
        raise
