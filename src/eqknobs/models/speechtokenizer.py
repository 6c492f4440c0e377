"""SpeechTokenizer (Zhang et al. 2023, arXiv 2308.16692), which is not in transformers, as its authors publish it.

Its network is EnCodec's, not causal and with a bidirectional LSTM in the encoder, so transformers' modules make it up;
the names of the weights are translated. The head that was distilled from HuBERT is of training only and left out.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel

from eqknobs.errors import EqknobsError
from eqknobs.io import read_json
from eqknobs.models import ModelCfg
from eqknobs.models.base import one_line, weights_hash
from eqknobs.models.encodec import Encodec

FOLDER, WEIGHTS = "speechtokenizer_hubert_avg", "SpeechTokenizer.pt"  # where fnlp/SpeechTokenizer has its files
# Of the authors' names, each in turn; `weight_g` and `weight_v` are how weight norm was stored before torch 2.
NAMES = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv|convtr)\.\1\.", r".conv."),
    (r"\.weight_g$", r".parametrizations.weight.original0"),
    (r"\.weight_v$", r".parametrizations.weight.original1"),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
)
HEAD = "transform."


class SpeechTokenizer(Encodec):
    """SpeechTokenizer: a folder with `config.json` and `SpeechTokenizer.pt`, or a hub id (fnlp/SpeechTokenizer)."""

    def _load(self, cfg: ModelCfg) -> tuple[Any, str]:
        config_file, weights, revision = _files(cfg)
        name = f"models.{cfg['name']}"
        with one_line(f"{name}: cannot read {config_file}"):
            net = network(read_json(config_file))
        with one_line(f"{name}: cannot load {weights}; only tensors are read of it, so that it can run no code"):
            stored = torch.load(weights, map_location="cpu", weights_only=True)
            tensors = {translated(key): tensor for key, tensor in stored.items() if not key.startswith(HEAD)}
            net.load_state_dict(tensors)
        return net.float(), revision


class _BidirectionalLSTM(nn.Module):
    """EnCodec's LSTM in both directions: 2 · dimension channels, its input added to either."""

    def __init__(self, dimension: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(dimension, dimension, layers, bidirectional=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, dimension, frames] -> [batch, 2 · dimension, frames]."""
        steps = hidden.permute(2, 0, 1)
        return (self.lstm(steps)[0] + steps.repeat(1, 1, 2)).permute(1, 2, 0)


def network(raw: dict[str, Any]) -> EncodecModel:
    """The untrained network of an authors' config.json. Raises EqknobsError for an activation other than ELU."""
    if raw["activation"] != "ELU":
        raise EqknobsError(f"activation {raw['activation']!r} is not supported; take speechtokenizer_hubert_avg (ELU)")
    frame_rate = math.ceil(raw["sample_rate"] / math.prod(raw["strides"]))
    bits = math.ceil(math.log2(raw["codebook_size"])) * frame_rate
    config = EncodecConfig(
        sampling_rate=raw["sample_rate"],
        # How transformers counts codebooks; half of one more keeps the rounding down on the right side.
        target_bandwidths=[(raw["n_q"] + 0.5) * bits / 1000],
        hidden_size=raw["dimension"],
        num_filters=raw["n_filters"],
        num_residual_layers=raw["n_residual_layers"],
        upsampling_ratios=list(raw["strides"]),
        residual_kernel_size=raw["residual_kernel_size"],
        dilation_growth_rate=raw["dilation_base"],
        num_lstm_layers=raw["lstm_layers"],
        codebook_size=raw["codebook_size"],
        use_causal_conv=False,
    )
    net = EncodecModel(config)
    if raw["bidirectional"]:
        layers = net.encoder.layers
        place = next(i for i, layer in enumerate(layers) if hasattr(layer, "lstm"))
        layers[place] = _BidirectionalLSTM(layers[place].lstm.input_size, config.num_lstm_layers)
        last = type(layers[-1])
        layers[-1] = last(config, 2 * layers[-1].conv.in_channels, config.hidden_size, config.last_kernel_size)
    return net


def translated(key: str) -> str:
    """transformers' name of a tensor that its authors call `key`."""
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    return key


def _files(cfg: ModelCfg) -> tuple[Path, Path, str]:
    """config.json, the weights and the revision."""
    name, path, pinned = cfg["name"], str(cfg["path"]), cfg.get("revision")
    folder = Path(path)
    if folder.is_dir():
        files = folder / "config.json", folder / WEIGHTS
        if missing := [file.name for file in files if not file.is_file()]:
            raise EqknobsError(
                f"models.{name}.path: {folder} has no {missing[0]}; a SpeechTokenizer is a folder with config.json and "
                f"{WEIGHTS}"
            )
        revision = weights_hash([files[1]])
        if pinned is not None and pinned != revision:
            raise EqknobsError(
                f"models.{name}.revision: {folder} has weights {revision}, not {pinned}; mend the folder or the config"
            )
        return *files, revision
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise EqknobsError(
            f"models.{name}.path: no folder {path}; give a model folder or a hub id such as fnlp/SpeechTokenizer"
        )
    with one_line(
        f"models.{name}: cannot load {path!r} (no such folder, so taken as a hub id); check path and network"
    ):
        config = Path(hf_hub_download(path, f"{FOLDER}/config.json", revision=pinned))
        revision = config.parent.parent.name  # the snapshot's folder is named after the commit
        weights = hf_hub_download(path, f"{FOLDER}/{WEIGHTS}", revision=revision)
    return config, Path(weights), revision
