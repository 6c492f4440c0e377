"""Whether words can be judged: where the codec itself loses them, a word error says nothing about an edit."""

from typing import Any

import pandas as pd

from eqknobs.evidence.estimates import WER, counts, estimate
from eqknobs.evidence.stage import Context

UNMEASURABLE = "unmeasurable"
# Which condition of a stage is the codec alone.
REFERENCES = {
    "codec": ("path", "quantized"),
    "steering": ("arm", "codec_roundtrip"),
    "importance": ("map", "none"),
    "quantisation": ("plan", "none"),
}


def words_rule(at: Context) -> dict[str, Any]:
    """WER of the codec's round trip on test, with counts, and whether it leaves words to be judged.

    It is that of the codec stage at `word_codebooks` (None: without the quantiser); where there is none, the reference
    that the steering, the importance or the quantisation stage renders: the same sound.
    """
    codebooks, threshold = at.cfg["word_codebooks"], at.cfg["unmeasurable_wer"]
    for stage in REFERENCES:
        if not at.inputs.has(f"scores/{at.target}.{stage}.signal.csv"):
            continue
        clips = at.inputs.scores(at.target, stage)
        if stage == "codec":
            quantised = (clips["path"] == "quantized") & (clips["codebooks"] == codebooks)
            clips = clips[clips["path"] == "unquantized" if codebooks is None else quantised]
        else:
            column, reference = REFERENCES[stage]
            clips = clips[clips[column] == reference]
        clips = clips[(clips["split"] == "test") & clips["errors"].notna()].drop_duplicates("id")
        if len(clips):
            break
    found = estimate(clips, WER, at.cfg)
    measurable = not found["wer"] > threshold
    return {"codebooks": codebooks, "threshold": threshold, "measurable": measurable, **found, **counts(clips)}


def mark_words(table: pd.DataFrame, measurable: bool) -> pd.DataFrame:
    """The table, with "unmeasurable" in every judged word cell unless words are measurable."""
    if measurable:
        return table
    columns = [c for c in table if c.startswith(("wer", "wer_text"))]
    table[columns] = table[columns].astype(object).where(table[columns].isna(), UNMEASURABLE)
    return table
