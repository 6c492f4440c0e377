"""What the codec alone does to speech: the table `codec.csv`."""

import math
from typing import Any

from eqknobs.errors import counted
from eqknobs.evidence.estimates import (
    MEL_DISTANCE,
    SPEAKER_SIMILARITY,
    WER,
    WER_TEXT,
    Measure,
    counts,
    estimate,
    groups,
    table,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import ends, estimated, headline, number, sample
from eqknobs.evidence.words import UNMEASURABLE, words_rule

STAGE = "codec"
COLUMNS = {
    "codec": "target voices path codebooks split clips wer wer_text centroid_correlation_clip "
    "centroid_correlation_frame mel_distance speaker_similarity speakers wer_low wer_high wer_text_low wer_text_high "
    "centroid_correlation_frame_low centroid_correlation_frame_high mel_distance_low mel_distance_high "
    "speaker_similarity_low speaker_similarity_high sae token_flip_rate",
}
NOTHING: dict[str, Any] = {"words": None}
CENTROID_CORRELATION = Measure("centroid_correlation_frame", "centroid_correlation_frame", None, "higher")
TOKEN_FLIP_RATE = Measure("token_flip_rate", "tokens_flipped", "tokens", "lower")


def voices(at: Context) -> dict[str, str]:
    """speaker -> "heard" or "unheard" in the codec's training, from the record that `own["training"]` names for the
    target, where there is one."""
    record = at.own["training"].get(at.target)
    training = at.inputs.json(record) if record and at.inputs.has(record) else {}
    return {str(speaker): kind for kind in ("heard", "unheard") for speaker in training.get(f"voices_{kind}") or []}


def tabulate(at: Context) -> Tabulated:
    """One row a (voices, path, codebooks, split)."""
    rows, known = at.inputs.scores(at.target, "codec"), voices(at)
    rows["voices"] = [known.get(speaker, "unknown") for speaker in rows["speaker"]]
    found = []
    for key, clips in groups(rows, ["voices", "path", "codebooks", "split", "sae"]):
        row = {"target": at.target, **key, **counts(clips)}
        for measure in (WER, WER_TEXT, CENTROID_CORRELATION, MEL_DISTANCE, SPEAKER_SIMILARITY):
            row |= estimate(clips, measure, at.cfg)
        pair = clips[["centroid_hz", "centroid_original_hz"]].dropna()
        row |= estimate(clips, TOKEN_FLIP_RATE, at.cfg, interval=False)
        varies = len(pair) > 2 and (pair.std() > 0).all()
        row["centroid_correlation_clip"] = float(pair.corr().iloc[0, 1]) if varies else math.nan
        found.append(row)
    return Tabulated({"codec": table(found, COLUMNS["codec"])}, {"words": words_rule(at)})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the codec costs in words."""
    words = facts["words"]
    path = "without its quantiser" if words["codebooks"] is None else f"at {counted(words['codebooks'], 'codebook')}"
    text = f"The codec alone, {path}, costs a word error rate of "
    text += f"{number(words['wer'])} {ends(words['wer_low'], words['wer_high'])}"
    if not words["measurable"]:
        text += f": above {words['threshold']}, so what an edit costs in words is {UNMEASURABLE}"
    detail = f"against the recogniser's own transcript of the untouched clip; {sample(words)}"
    return [headline("codec", "measured", f"{text}.", detail, estimate=estimated(words, "wer"))]
