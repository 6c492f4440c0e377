"""Speech with noise in it, beside itself without: a corpus made of others."""

from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import pandas as pd

from eqknobs.audio import read_clip, read_samples, write_flac
from eqknobs.corpus.manifest import unite
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256

LIMIT = 0.99  # of full scale


class MixtureCfg(TypedDict):
    """A corpus of `corpora` with `source: mixture`."""

    source: Literal["mixture"]
    of: list[str]  # corpora whose clips get noise
    noise: list[str]  # corpora whose clips are the noise
    snr_db: list[float]  # from, to


def noisy(wav: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Sound [n] with noise added at a ratio of their RMS, float32 [n], at the sound's own RMS, so that loudness does
    not tell which is which. A shorter noise starts again. Raises EqknobsError where either is silent."""
    under = np.resize(noise, len(wav)).astype(np.float64)
    levels = [np.sqrt(np.mean(np.square(part, dtype=np.float64))) for part in (wav, under)]
    if min(levels) == 0:
        raise EqknobsError("a silent clip cannot be mixed; leave it out of the corpus")
    mixed = wav + under * (levels[0] / levels[1] * 10 ** (-snr_db / 20))
    mixed *= levels[0] / np.sqrt(np.mean(np.square(mixed)))
    return (mixed * min(1.0, LIMIT / np.abs(mixed).max())).astype(np.float32)


def mix(
    parts: dict[str, pd.DataFrame], cfg: MixtureCfg, folder: str | Path, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write every clip of some corpora with noise into a folder: (manifest, rejected, which is empty).

    parts: manifests by name. The manifest has every clip twice, clean (the file that there is) and noisy
    (`<id>.noisy`), with a column `noise`, else as of `eqknobs.corpus.manifest.unite`. A clip's noise is from its own
    split and, like the ratio, drawn by seed and id. Raises EqknobsError where a split has no noise, or sound changed.
    """
    clean, _ = unite({name: parts[name] for name in cfg["of"]})
    noise = pd.concat([parts[name].assign(corpus=name) for name in sorted(cfg["noise"])], ignore_index=True)
    low, high = cfg["snr_db"]
    rows = []
    for clip in clean.itertuples():
        own = noise[noise["split"] == clip.split]
        if own.empty:
            raise EqknobsError(
                f"{', '.join(cfg['noise'])}: no {clip.split} clip to mix into speech; raise their limits"
            )
        rng = np.random.default_rng([seed, *clip.id.encode()])
        other = own.iloc[int(rng.integers(len(own)))]
        rate = read_samples(clip.path)[1]
        path = Path(folder) / f"{clip.id}.noisy.flac"
        snr = low + (high - low) * float(rng.random())
        write_flac(path, noisy(read_clip(clip, rate), read_clip(other, rate), snr), rate)
        rows.append({**clean.loc[clip.Index], "id": f"{clip.id}.noisy", "path": str(path), "sha256": file_sha256(path)})
    mixed = pd.concat([clean.assign(noise="clean"), pd.DataFrame(rows).assign(noise="noisy")], ignore_index=True)
    return mixed.sort_values("id", ignore_index=True), pd.DataFrame(columns=["path", "reason"])
