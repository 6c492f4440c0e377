"""What the codec alone does to speech: the round trips that every other stage is measured against."""

from pathlib import Path
from typing import Any

from eqknobs.activations import ActivationCache
from eqknobs.io import read_csv
from eqknobs.renders import Condition, open_codec, pick_clips, render_conditions


def codec_conditions(codebooks: list[int]) -> list[Condition]:
    """The untouched clip, the round trip around the quantiser, and one through each number of codebooks."""
    about = {"keep": True, "pitch": True}
    return [
        Condition("original", {"path": "original", "codebooks": None}, codec=False, **about),
        Condition("unquantized", {"path": "unquantized", "codebooks": None}, **about),
        *(
            Condition(f"quantized-{count}", {"path": "quantized", "codebooks": count}, codebooks=count, **about)
            for count in codebooks
        ),
    ]


def render_codec(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    out_dir: str | Path,
    signal_csv: str | Path,
    cfg: dict[str, Any],
) -> None:
    """Render and measure round trips of test clips; see `render_conditions` for the files.

    cfg: `model`, `site`, `codebooks` (list), `clips`. Raises EqknobsError if the model cannot
    decode or has fewer codebooks.
    """
    clips = pick_clips(read_csv(manifest_csv), "test", cfg["clips"])
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model:
        conditions = codec_conditions(cfg["codebooks"])
        render_conditions(model, cfg["site"], clips, cache, conditions, out_dir, signal_csv)
