"""Small activation caches and label files in the layout of docs/layout.md, for tests that need no audio."""

from pathlib import Path

import h5py
import numpy as np


def write_cache(
    path: Path, acts: np.ndarray, utterances: list[tuple[str, str, str, int]], **columns: np.ndarray
) -> Path:
    """utterances: (id, speaker, split, frames), in the order of the rows of acts [N, width]; columns: further ones."""
    ids, speakers, splits, frames = zip(*utterances)
    frames = np.array(frames)
    text = h5py.string_dtype("utf-8")
    train = np.repeat(np.array(splits) == "train", frames)
    with h5py.File(path, "w") as file:
        file.create_dataset("activations", data=acts.astype(np.float32))
        file["frame_times"] = (np.arange(len(acts)) + 0.5) / 25
        for name, values in (("id", ids), ("speaker", speakers), ("split", splits), ("sha256", ids)):
            file.create_dataset(f"utterances/{name}", data=list(values), dtype=text)
        file["utterances/start"] = np.cumsum(frames) - frames
        file["utterances/frames"] = frames
        file["utterances/samples"] = frames * 640
        for name, values in columns.items():
            file[f"utterances/{name}"] = values
        file["done"] = np.ones(len(ids), np.uint8)
        file.attrs.update(
            model="synthetic",
            revision="0",
            site="encoder",
            module_path="encoder",
            frame_rate=25.0,
            hop=640,
            sample_rate=16000,
            manifest_sha256="0" * 64,
            versions="{}",
            train_frames=int(train.sum()),
            mean=acts[train].mean(0, dtype=np.float64),
            std=acts[train].std(0, dtype=np.float64),
        )
    return path


def write_labels(path: Path, logmel: np.ndarray, **labels: np.ndarray) -> Path:
    """Datasets centroid, rms, pitch, energetic, voiced [N] (missing ones: NaN or all true) and logmel [N, mels]."""
    count = len(logmel)
    with h5py.File(path, "w") as file:
        for name in ("centroid", "rms", "pitch", "periodicity"):
            file[name] = np.asarray(labels.get(name, np.full(count, np.nan)), dtype=np.float32)
        for name in ("energetic", "voiced"):
            file[name] = np.asarray(labels.get(name, np.ones(count)), dtype=bool)
        file["logmel"] = logmel.astype(np.float32)
    return path
