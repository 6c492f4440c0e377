"""What the codec alone does to speech: the round trips that every other stage is measured against."""

from pathlib import Path
from typing import Any

from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import read_csv
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE
from eqknobs.sound.renders import Condition, OpenedCfg, open_codec, pick_clips, render_conditions, render_pieces


class CodecCfg(OpenedCfg):
    """What `render_codec` reads: of the section `codec`, and what is opened."""

    codebooks: list[int]
    clips: int


def codec_conditions(codebooks: list[int], saes: dict[str, SAE]) -> list[Condition]:
    """The untouched clip, the round trip around the quantiser, one through each number of codebooks, and with every
    SAE's reconstruction in place of the latents, through the largest number: what an SAE loses, in sound."""

    def condition(key: str, path: str, count: int | None = None, sae: str | None = None, **more: Any) -> Condition:
        columns = {"path": path, "codebooks": count, "sae": sae}
        return Condition(key, columns, codebooks=count, keep=True, pitch=True, **more)

    return [
        condition("original", "original", codec=False),
        condition("unquantized", "unquantized"),
        *(condition(f"quantized-{count}", "quantized", count) for count in codebooks),
        *(
            condition(f"sae-{name}", "sae", max(codebooks), name, edit=sae, tokens=True)
            for name, sae in sorted(saes.items())
        ),
    ]


def render_codec(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    sae_dirs: dict[str, Path],
    out_dir: str | Path,
    signal_csv: str | Path,
    cfg: CodecCfg,
    pieces: Pieces | None = None,
) -> None:
    """Render and measure round trips of test clips; see `render_conditions` for the files.

    sae_dirs: SAE name -> folder. Raises EqknobsError if the model cannot decode or has fewer codebooks.
    """
    clips = pick_clips(read_csv(manifest_csv), "test", cfg["clips"])
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model:
        saes = {name: SAE.load(folder) for name, folder in sae_dirs.items()}
        conditions = codec_conditions(cfg["codebooks"], saes)
        kept = render_pieces(pieces, model, cfg)
        render_conditions(model, cfg, clips, cache, conditions, out_dir, signal_csv, pieces=kept)
