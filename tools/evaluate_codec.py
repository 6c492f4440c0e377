"""How well a codec folder carries speech, voice by voice: a developer's check on all voices of the corpus.

    python tools/evaluate_codec.py resources/models/tiny-mimi docs/results/codec_voices.csv [--other FOLDER] [--clips 6]

The workflow's codec.csv holds the test split only; here every corpus voice is heard (no corpus text was in training),
and, with --other, a folder of speech by strangers (16 kHz FLAC or WAV, one row as voice `other`). `wer` is against the
recogniser's transcript of the untouched clip, intervals resample speakers, then clips (one speaker: clips).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_audio
from eqknobs.evidence import stats
from eqknobs.io import output_file, read_text_csv, write_csv
from eqknobs.models import load_model
from eqknobs.sound import metrics
from eqknobs.sound.judges import SpeakerEncoder, Transcriber, similarity, word_errors

SITE, RATE = "encoder_transformer", 16000


def corpus_clips(corpus: Path, per_voice: int) -> pd.DataFrame:
    """id, path, speaker, voice, kind (heard | unheard), text of the first clips of every voice."""
    voices = read_text_csv(corpus / "voices.csv").set_index("speaker")
    rows = []
    for transcript in sorted(corpus.rglob("*.trans.txt")):
        for line in transcript.read_text().splitlines()[:per_voice]:
            key, text = line.split(" ", 1)
            voice = voices.loc[key.split("-")[0]]
            about = {"speaker": key.split("-")[0], "voice": voice["voice"], "kind": voice["codec_training"]}
            rows.append({"id": key, "path": transcript.with_name(f"{key}.flac"), "text": text} | about)
    return pd.DataFrame(rows)


def other_clips(folder: Path) -> pd.DataFrame:
    """The same for a folder of strangers; the speaker is the file name's part before the first dash."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".flac", ".wav"))
    return pd.DataFrame(
        {"id": p.stem, "path": p, "speaker": p.stem.split("-")[0], "voice": "other", "kind": "other", "text": None}
        for p in paths
    )


def measure(clips: pd.DataFrame, model_folder: Path, codebooks: list[int]) -> pd.DataFrame:
    """One row a (clip, path): errors, words, errors_text, words_text, speaker_similarity, mel_distance, centroids."""
    model = load_model({"name": "codec", "kind": "mimi", "path": str(model_folder), "device": "cpu"})
    judge, encoder = Transcriber({"asr": "tiny.en", "beam": 1, "device": "cpu"}), SpeakerEncoder()
    rows: list[dict[str, Any]] = []
    for clip in tqdm(list(clips.itertuples(index=False)), unit="clip"):
        wav = read_audio(clip.path, RATE)
        acts = model.encode(wav, SITE)
        reference, voice = judge.transcribe(wav), encoder.embed(wav)
        for path, count in (("unquantized", None), *(("quantized", c) for c in codebooks)):
            out = model.decode(acts, SITE, len(wav), count)
            words = judge.transcribe(out)
            errors, total = word_errors(reference, words)
            errors_text, total_text = word_errors(clip.text, words) if clip.text else (np.nan, np.nan)
            rows.append(
                {"id": clip.id, "speaker": clip.speaker, "voice": clip.voice, "kind": clip.kind, "path": path}
                | {"codebooks": count, "errors": errors, "words": total}
                | {"errors_text": errors_text, "words_text": total_text}
                | {"speaker_similarity": similarity(voice, encoder.embed(out))}
                | {"mel_distance": metrics.mel_distance(wav, out, RATE)}
                | {"centroid": metrics.clip_centroid(out, RATE), "centroid_original": metrics.clip_centroid(wav, RATE)}
                | {"centroid_correlation_frame": metrics.frame_centroid_correlation(wav, out, RATE)}
            )
    return pd.DataFrame(rows)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a (kind or voice, path, codebooks)."""
    table = []
    for by in ("kind", "voice"):
        part = rows if by == "kind" else rows[rows["kind"] != "other"]
        for (name, path, count), clips in part.groupby([by, "path", "codebooks"], dropna=False):
            low, high = stats.ratio_interval(clips["errors"], clips["words"], clips["speaker"].tolist(), 1000, 0)
            table.append(
                {"group": by, "name": name, "path": path, "codebooks": count}
                | {"clips": len(clips), "speakers": clips["speaker"].nunique()}
                | {"wer": clips["errors"].sum() / clips["words"].sum(), "wer_low": low, "wer_high": high}
                | {"wer_text": clips["errors_text"].sum() / max(1, clips["words_text"].sum())}
                | {"centroid_correlation_clip": clips["centroid"].corr(clips["centroid_original"])}
                | clips[["centroid_correlation_frame", "mel_distance", "speaker_similarity"]].mean().to_dict()
            )
    found = pd.DataFrame(table)
    found.loc[found["name"] == "other", "wer_text"] = np.nan
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=output_file)
    parser.add_argument("--corpus", type=Path, default=Path("resources/corpus"))
    parser.add_argument("--other", type=Path)
    parser.add_argument("--clips", type=int, default=6, help="of each corpus voice")
    parser.add_argument("--codebooks", type=int, nargs="+", default=[16, 8])
    args = parser.parse_args()
    clips = corpus_clips(args.corpus, args.clips)
    if args.other:
        clips = pd.concat([clips, other_clips(args.other)], ignore_index=True)
    table = summarise(measure(clips, args.model, args.codebooks))
    write_csv(args.out, table)
    with pd.option_context("display.width", 200, "display.max_columns", 20):
        print(table.round(3).to_string())


if __name__ == "__main__":
    main()
