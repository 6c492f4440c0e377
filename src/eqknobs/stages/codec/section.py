"""The codec's section of the report."""

from typing import Any

import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence import display
from eqknobs.evidence.stage import Context

STAGE, TITLE, SOUNDS = "codec", "Codec", True
ABOUT = "What a round trip through the codec alone does to words, voice and spectrum."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "codec": (
        ["", "version 1", "rerun"],
        [
            ["round trip: centroid (Hz)", "–", "1442 (original 1594)"],
            ["round trip: WER (original .019)", "–", ".018"],
            ["round trip: speaker similarity", "–", ".923"],
        ],
    ),
}


def _path(row: dict[str, Any]) -> str:
    path = row["path"] if pd.isna(row["sae"]) else f"SAE {row['sae']}"
    return path if pd.isna(row["codebooks"]) else f"{path}, {counted(int(row['codebooks']), 'codebook')}"


def show(at: Context) -> dict[str, Any]:
    """The table of round trips."""
    rows = at.inputs.csv("tables/codec.csv")
    columns = {
        "path": _path,
        "voices": "voices",
        **display.WORDED,
        "centroid r, clips": ("centroid_correlation_clip", 3),
        "centroid r, frames": ("centroid_correlation_frame", 3),
        "mel (dB)": ("mel_distance", 2),
        "tokens changed": ("token_flip_rate", 3),
        "clips / speakers": display.sample,
    }
    return {"round_trips": display.laid_out(rows[rows["target"] == at.target], columns)}
