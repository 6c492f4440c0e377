"""Freeze what the authors' SpeechTokenizer makes of small random weights, for `tests/unit/models`.

Needs `speechtokenizer==1.0.1` and `einops` beside this project's requirements (pip install --no-deps; its trainer's own
requirements are not needed):

    PYTHONPATH=src python tools/make_speechtokenizer_fixture.py
"""

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).parents[1] / "tests/fixtures/speechtokenizer.json"
CONFIG = {
    "n_filters": 2,
    "strides": [4, 2],
    "dimension": 8,
    "semantic_dimension": 6,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "lstm_layers": 2,
    "activation": "ELU",
    "codebook_size": 16,
    "n_q": 3,
    "sample_rate": 16000,
}
SAMPLES = 96  # 12 hops


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of such a model, as its authors store them."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int, transposed: bool = False) -> None:
        stem = f"{name}.convtr.convtr" if transposed else f"{name}.conv.conv"
        weight = (inputs, outputs, kernel) if transposed else (outputs, inputs, kernel)
        found.update({f"{stem}.bias": (outputs,), f"{stem}.weight_g": (weight[0], 1, 1), f"{stem}.weight_v": weight})

    def lstm(name: str, width: int, directions: tuple[str, ...]) -> None:
        for layer in (0, 1):
            for end in directions:
                inputs = width if layer == 0 else width * len(directions)
                found.update({f"{name}.lstm.weight_ih_l{layer}{end}": (4 * width, inputs)})
                found.update({f"{name}.lstm.weight_hh_l{layer}{end}": (4 * width, width)})
                found.update({f"{name}.lstm.bias_{kind}_l{layer}{end}": (4 * width,) for kind in ("ih", "hh")})

    def block(name: str, width: int) -> None:
        conv(f"{name}.block.1", width // 2, width, 3)
        conv(f"{name}.block.3", width, width // 2, 1)
        conv(f"{name}.shortcut", width, width, 1)

    conv("encoder.model.0", 2, 1, 7)
    block("encoder.model.1", 2)
    conv("encoder.model.3", 4, 2, 4)
    block("encoder.model.4", 4)
    conv("encoder.model.6", 8, 4, 8)
    lstm("encoder.model.7", 8, ("", "_reverse"))
    conv("encoder.model.9", 8, 16, 7)
    found |= {"transform.weight": (6, 8), "transform.bias": (6,)}
    for i in range(3):
        stem = f"quantizer.vq.layers.{i}._codebook"
        found |= {f"{stem}.inited": (1,), f"{stem}.cluster_size": (16,)}
        found |= {f"{stem}.embed": (16, 8), f"{stem}.embed_avg": (16, 8)}
    conv("decoder.model.0", 8, 8, 7)
    lstm("decoder.model.1", 8, ("",))
    conv("decoder.model.3", 4, 8, 8, transposed=True)
    block("decoder.model.4", 4)
    conv("decoder.model.6", 2, 4, 4, transposed=True)
    block("decoder.model.7", 2)
    conv("decoder.model.9", 1, 2, 7)
    return found


def write_tiny(folder: Path) -> np.ndarray:
    """Write a SpeechTokenizer of random weights as its authors store one; returns the sound to run it on [samples]."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes().items():
        # Norms large enough for the sound, rather than biases, to decide the codes.
        scale = 3.0 if name.endswith("weight_g") else 0.4
        values = rng.normal(scale=scale, size=shape).astype(np.float32)
        tensors[name] = torch.ones(shape) if name.endswith(("inited", "cluster_size")) else torch.from_numpy(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors, folder / "SpeechTokenizer.pt")
    return rng.normal(scale=0.3, size=SAMPLES).astype(np.float32)


def made(model: Any, wav: np.ndarray) -> dict[str, Any]:
    """What the authors' model makes of a sound: encoder output [frames, width], codes [codebooks, frames], what its
    decoder gets of two codebooks [frames, width], and the sound of all and of two of them [samples]."""
    with torch.no_grad():
        batch = torch.from_numpy(wav)[None, None]
        codes = model.encode(batch)
        found = {"encoded": model.encoder(batch)[0].T, "codes": codes[:, 0]}
        found["dequantised"] = model.quantizer.decode(codes[:2])[0].T
        found |= {f"sound_{n}": model.decode(codes[:n])[0, 0] for n in (2, 3)}
    return {name: rounded(tensor).tolist() for name, tensor in found.items()}


def rounded(tensor: Tensor) -> np.ndarray:
    """To six digits; codes, which are whole, as they are."""
    return np.round(tensor.numpy().astype(float), 6) if tensor.is_floating_point() else tensor.numpy()


def main() -> None:
    sys.modules["speechtokenizer.trainer"] = trainer = types.ModuleType("trainer")  # which wants much that is unused
    trainer.SpeechTokenizerTrainer = None  # type: ignore[attr-defined]
    authors = importlib.import_module("speechtokenizer").SpeechTokenizer
    with tempfile.TemporaryDirectory() as folder:
        wav = write_tiny(Path(folder))
        model = authors.load_from_checkpoint(f"{folder}/config.json", f"{folder}/SpeechTokenizer.pt").eval()
    FIXTURE.write_text(json.dumps(made(model, wav)).replace("], ", "],\n") + "\n")
    print(f"wrote {FIXTURE}, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
