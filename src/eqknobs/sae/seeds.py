"""All seeds of one SAE in one job: the cache is opened, and its pages read from the disk, once for all.

Each seed draws an order of its own, so seeds train one after another. Snakemake deletes a job's outputs before it runs,
so the store of pieces keeps every trained SAE: where a seed is added, or a job was killed, the others come from it.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.pieces import Pieces
from eqknobs.sae.base import SAE
from eqknobs.sae.training import SAECfg, train_sae

FILES = ("config.json", "log.csv", "sae.safetensors")


def train_seeds(
    cache_h5: str | Path,
    folders: Mapping[int, str | Path],
    cfg: SAECfg,
    made_of: Any,
    pieces: Pieces,
    device: str = "cpu",
) -> None:
    """Train an SAE once a seed; folders: seed -> where `train_sae` writes it.

    made_of: what decides the weights beside cfg and the cache (digests of the code), as plain JSON values. Raises
    EqknobsError as `train_sae`.
    """
    with ActivationCache(cache_h5) as cache:
        data = [str(cache.attrs[name]) for name in ("model", "site", "manifest_sha256", "train_frames")]
        data += [cache.mean.tobytes().hex(), cache.std.tobytes().hex()]
    for seed, folder in sorted(folders.items()):
        if pieces.folder is None:
            train_sae(cache_h5, folder, cfg, seed, device)
            continue
        piece = pieces.path("saes", [cfg, seed, data, made_of], "")
        if _whole(piece):
            print(f"seed {seed}: trained before")
            _take(piece, Path(folder))
        else:
            train_sae(cache_h5, folder, cfg, seed, device)
            with atomic_path(piece) as temporary:
                temporary.mkdir()
                for name in FILES:
                    _link(Path(folder) / name, temporary / name)


def _whole(piece: Path) -> bool:
    """Whether an SAE is there and can be read."""
    try:
        SAE.load(piece)
    except EqknobsError:
        return False
    return all((piece / name).is_file() for name in FILES)


def _take(piece: Path, folder: Path) -> None:
    for name in FILES:
        os.utime(piece / name)  # used now: `prune` leaves it
        with atomic_path(folder / name) as temporary:
            _link(piece / name, temporary)


def _link(source: Path, to: Path) -> None:
    """A second name, which costs no disk; a copy where the file has one already (Snakemake touches its outputs, and one
    run must not touch another's) or the file system has no links."""
    try:
        if source.stat().st_nlink > 1:
            raise OSError(errno.EMLINK, "linked already")
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
