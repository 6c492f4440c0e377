"""Write tests/fixtures/sae_peers: what other libraries make of random weights and inputs.

    bash benchmarks/make_peers_env.sh
    .venv-peers/bin/python tools/make_sae_fixtures.py [--out FOLDER]

One safetensors file per library and architecture. Weights are in our form, codes relu(W_enc (x − b_dec) + b_enc) and
reconstructions f W_dec + b_dec: W_enc, W_dec [m, d], b_enc [m], b_dec [d], threshold [m] or [] where there is one; x
[N, d]; the library's codes [N, m] and reconstruction [N, d]. Metadata `about`, JSON: library, version, architecture,
variant (ours) and k. Here and nowhere else weights are turned into the form that each library wants.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eqknobs.io import output_folder

ROOT = Path(__file__).resolve().parents[1]
D, M, N, K = 16, 48, 32, 6
MARGIN = 1e-4  # how far every activation is from the limit that decides on it: rounding cannot change the choice
Weights = dict[str, Tensor]


def case(variant: str, seed: int) -> tuple[Weights, Tensor, float]:
    """Weights, x, and the margin between the activations and the limit that decides on them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    w_dec = normal(M, D)
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    weights = {"W_enc": 0.5 * w_dec + 0.1 * normal(M, D), "W_dec": w_dec, "b_enc": 0.05 * normal(M)}
    weights["b_dec"] = 0.2 * normal(D)
    x = weights["b_dec"] + 0.5 * normal(N, D)
    h = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    if variant == "topk":
        kept = h.topk(K + 1, dim=1).values
        return weights, x, (kept[:, K - 1] - kept[:, K]).min().item()
    if variant == "relu":
        weights["threshold"] = torch.zeros(())
    elif variant == "jumprelu":
        weights["threshold"] = 0.25 + 0.5 * torch.rand(M, generator=generator)
    else:
        kept = h.flatten().topk(N * K + 1).values
        weights["threshold"] = (kept[-2] + kept[-1]) / 2
    return weights, x, (h - weights["threshold"]).abs().min().item()


def sae_lens(architecture: str, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction of SAELens; BatchTopK as it saves it for inference, which is as JumpReLU."""
    import sae_lens as lens

    shape = {"d_in": D, "d_sae": M, "apply_b_dec_to_input": True}
    if architecture == "batchtopk":
        training = lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**shape, k=K))
        fill(training, w_enc=w["W_enc"].T, w_dec=w["W_dec"], b_enc=w["b_enc"], b_dec=w["b_dec"])
        training.topk_threshold = w["threshold"].double()
        with tempfile.TemporaryDirectory() as folder:
            training.save_inference_model(folder)
            sae = lens.SAE.load_from_disk(folder)
        assert sae.cfg.architecture() == "jumprelu"
        return sae.encode(x), sae(x)
    kinds = {
        "standard": lambda: lens.StandardSAE(lens.StandardSAEConfig(**shape)),
        "topk": lambda: lens.TopKSAE(lens.TopKSAEConfig(**shape, k=K)),
        "jumprelu": lambda: lens.JumpReLUSAE(lens.JumpReLUSAEConfig(**shape)),
    }
    sae = fill(kinds[architecture](), w_enc=w["W_enc"].T, w_dec=w["W_dec"], b_enc=w["b_enc"], b_dec=w["b_dec"])
    if architecture == "jumprelu":
        sae.threshold.data = w["threshold"].clone()
    return sae.encode(x), sae(x)


def fill(sae: Any, w_enc: Tensor, w_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> Any:
    """Set the parameters of a module that has them under SAELens's names."""
    for name, value in (("W_enc", w_enc), ("W_dec", w_dec), ("b_enc", b_enc), ("b_dec", b_dec)):
        parameter = getattr(sae, name)
        assert parameter.shape == value.shape, name
        parameter.data = value.clone().contiguous()
    return sae


def dictionary_learning(architecture: str, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction of dictionary_learning."""
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    if architecture == "jumprelu":
        ae = JumpReluAutoEncoder(D, M)
        # It adds b_dec at the end without taking it off at the start.
        b_enc = w["b_enc"] - w["W_enc"] @ w["b_dec"]
        fill(ae, w_enc=w["W_enc"].T, w_dec=w["W_dec"], b_enc=b_enc, b_dec=w["b_dec"])
        ae.threshold.data = w["threshold"].clone()
        return ae.encode(x), ae(x)
    kinds = {
        "standard": lambda: AutoEncoder(D, M),
        "topk": lambda: AutoEncoderTopK(D, M, K),
        "batchtopk": lambda: BatchTopKSAE(D, M, K),
    }
    ae = kinds[architecture]()
    ae.encoder.weight.data, ae.encoder.bias.data = w["W_enc"].clone(), w["b_enc"].clone()
    ae.decoder.weight.data = w["W_dec"].T.clone()
    bias = ae.bias if architecture == "standard" else ae.b_dec
    bias.data = w["b_dec"].clone()
    if architecture == "batchtopk":
        ae.threshold = w["threshold"].clone()
    return ae.encode(x), ae(x)


LIBRARIES: dict[str, Callable[[str, Weights, Tensor], tuple[Tensor, Tensor]]] = {
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
}
# Their architecture -> our variant and what decides in it. A plain ReLU is our BatchTopK at threshold 0.
ARCHITECTURES = {
    "standard": ("batchtopk", "relu"),
    "topk": ("topk", "topk"),
    "batchtopk": ("batchtopk", "batchtopk"),
    "jumprelu": ("jumprelu", "jumprelu"),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=output_folder, default=str(ROOT / "tests/fixtures/sae_peers"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for library, run in LIBRARIES.items():
        for architecture, (variant, decides) in ARCHITECTURES.items():
            weights, x, _ = next(c for c in (case(decides, seed) for seed in itertools.count()) if c[2] > MARGIN)
            codes, reconstruction = run(architecture, weights, x)
            tensors = weights | {"x": x, "codes": codes, "reconstruction": reconstruction}
            about: dict[str, str | int] = {
                "library": library,
                "version": version(library),
                "architecture": architecture,
            }
            about |= {"variant": variant, "k": K}
            # One entry, because several are written in another order every time.
            metadata = {"about": json.dumps(about)}
            path = out / f"{library}-{architecture}.safetensors"
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
            print(
                f"{path.name}: {path.stat().st_size} bytes, {(codes > 0).sum(1).float().mean():.1f} active on a frame"
            )


if __name__ == "__main__":
    main()
