"""A random-weight codec, synthetic clips and everything upstream of the sound stages, small enough for unit tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import MimiConfig, MimiModel

from eqknobs.audio import write_flac
from eqknobs.corpus.activations import cache_activations
from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.labels import centroid_and_rms
from eqknobs.io import file_sha256, read_csv, write_csv
from eqknobs.models import load_model
from eqknobs.sae import make_config, new_sae
from eqknobs.stages.probes.compute import bin_edges
from helpers.synthetic import write_labels

RATE, WIDTH, FEATURES, CLASSES = 16000, 32, 48, 4
SITE = "encoder_transformer"
SPEAKERS = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "test"}


@dataclass
class World:
    """Paths of one run, by stage; `cfg` holds what every sound stage is given."""

    root: Path
    cfg: dict
    manifest: Path
    cache: Path
    labels: Path
    saes: dict[str, Path]
    probes: dict[str, Path]

    def model(self):
        return load_model(self.cfg["model"])

    def open(self) -> ActivationCache:
        return ActivationCache(self.cache)

    def clips(self, split: str) -> pd.DataFrame:
        manifest = read_csv(self.manifest)
        return manifest[manifest["split"] == split]


def save_codec(folder: Path, **changes: Any) -> Path:
    """A tiny random Mimi in transformers' format; `changes`: of its configuration."""
    torch.manual_seed(0)
    sizes = dict(
        sampling_rate=RATE,
        hidden_size=WIDTH,
        num_filters=4,
        upsampling_ratios=[8, 5, 4, 4],
        codebook_size=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=4,
        upsample_groups=WIDTH,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=10,
        layer_scale_initial_scale=0.5,
        initializer_range=0.3,
    )
    net = MimiModel(MimiConfig(**sizes | changes))
    with torch.no_grad():  # PyTorch's own initialisation fades to silence within a few convolutions
        for module in net.modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        for name, buffer in net.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
            elif name.endswith("cluster_usage"):
                buffer.fill_(1.0)
    net.save_pretrained(folder)
    return folder


def chirp(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A gliding harmonic tone with a wandering low-passed noise: the centroid moves within the clip."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2 * np.pi * t / seconds)) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 12))
    noise = rng.standard_normal(len(t)) * (0.2 + 0.8 * (np.sin(4 * np.pi * t / seconds) > 0))
    return (0.08 * tone + 0.05 * noise).astype(np.float32)


def make_world(root: Path) -> World:
    rng = np.random.default_rng(0)
    rows = []
    for i, (speaker, split) in enumerate(SPEAKERS.items()):
        for take in range(2):
            name, path = f"{speaker}-{take}", root / "audio" / f"{speaker}-{take}.flac"
            write_flac(path, chirp(rng, 1.0 + 0.13 * i + 0.2 * take), RATE)
            rows.append((name, str(path), speaker, split, "one two"))
    manifest = pd.DataFrame(rows, columns=["id", "path", "speaker", "split", "text"])
    manifest["sha256"] = manifest["path"].map(file_sha256)
    write_csv(root / "manifest.csv", manifest)
    model = {"name": "tiny", "kind": "mimi", "path": str(save_codec(root / "model")), "revision": None}
    model["device"] = "cpu"
    cache_activations(root / "manifest.csv", root / "cache.h5", model, SITE)
    with ActivationCache(root / "cache.h5") as cache:
        centroid = np.full(len(cache.acts), np.nan)
        for row in cache.utterances.itertuples():
            wav = chirp(np.random.default_rng(1), row.samples / RATE)
            centroid[row.start : row.start + row.frames] = centroid_and_rms(wav, RATE, 640, row.frames)[0]
        pitch = 100 + rng.random(len(centroid)) * 100
        write_labels(root / "labels.h5", np.zeros((len(centroid), 2)), centroid=centroid, pitch=pitch)
        saes = {}
        for name, extra in (("topk", {"k": 8}), ("rms_l1", {"l1": 0.1, "l1_on": "h"})):
            saes[name] = root / "saes" / name
            new_sae(
                make_config({"variant": name, "d_in": WIDTH, "d_sae": FEATURES, "seed": 3} | extra),
                cache.mean,
                cache.std,
            ).save(saes[name])
    probes = {}
    for name, values in (("centroid", centroid), ("pitch", pitch)):
        arrays = {"lag:raw": np.array(0)}
        for binning in ("quantile", "equal_width"):
            arrays[f"edges:{binning}"] = bin_edges(values[np.isfinite(values)], binning, CLASSES)
            for space, width in (("raw", WIDTH), ("sae:topk", FEATURES), ("sae:rms_l1", FEATURES)):
                arrays[f"{space}:{binning}:W"] = rng.standard_normal((CLASSES, width)).astype(np.float32)
                arrays[f"{space}:{binning}:b"] = np.zeros(CLASSES, np.float32)
        probes[name] = root / f"{name}.npz"
        np.savez(probes[name], **arrays)
    cfg = {"model": model, "site": SITE, "codebooks": 4, "seed": 0}
    return World(root, cfg, root / "manifest.csv", root / "cache.h5", root / "labels.h5", saes, probes)
