"""The codec's quantiser: codebooks fitted to latents, and trained through."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MimiModel

from eqknobs.errors import EqknobsError
from eqknobs.stages.codec_training.data import cut
from eqknobs.stages.codec_training.network import encode, hop


def quantise(model: MimiModel, latents: Tensor, codebooks: int) -> Tensor:
    """Returns the latents [batch, width, frames] as the first `codebooks` codebooks represent them."""
    codes = model.quantizer.encode(latents, codebooks)
    return model.quantizer.decode(codes.transpose(0, 1))


def quantise_straight_through(
    model: MimiModel, latents: Tensor, codebooks: int, decay: float | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises as `quantise` does, with the gradient passed straight through each quantiser's projected latents.

    latents is [batch, width, frames]; returns the quantised latents of the same shape and the commitment term, the mean
    square of what the codebooks leave relative to the projected latents' own (scalar). With `decay` the codebooks move
    towards what they were chosen for, as exponential moving averages of that decay a step.
    """
    quantizer = model.quantizer
    semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    depth = min(codebooks, quantizer.num_semantic_quantizers)
    out, left, power = torch.zeros_like(latents), latents.new_zeros(()), latents.new_zeros(())
    for part, used in ((semantic, depth), (acoustic, codebooks - depth)):
        if not used:
            continue
        projected = part.input_proj(latents)
        rows = projected.detach().transpose(1, 2).flatten(0, 1)
        residual = rows
        for layer in part.layers[:used]:
            book = layer.codebook
            chosen = book.quantize(residual)
            found = book.embed[chosen]
            if decay is not None:
                move_codebook(book, residual, chosen, decay)
            residual = residual - found
        quantised = (rows - residual).unflatten(0, (len(latents), -1)).transpose(1, 2)
        out = out + part.output_proj(projected + (quantised - projected).detach())
        left = left + (projected - quantised).square().mean()
        power = power + projected.detach().square().mean()
    return out, left / power


@torch.no_grad()
def move_codebook(book: Any, rows: Tensor, chosen: Tensor, decay: float) -> None:
    """Moves a codebook's entries towards the rows [n, dims] that chose them (indices [n]): one step of the average.

    `book` is transformers' MimiEuclideanCodebook.
    """
    one_hot = F.one_hot(chosen, book.codebook_size).to(rows.dtype)
    book.cluster_usage.mul_(decay).add_(one_hot.sum(0), alpha=1 - decay)
    book.embed_sum.mul_(decay).add_(one_hot.T @ rows, alpha=1 - decay)
    book._embed = None  # transformers caches the quotient of the two buffers


@torch.no_grad()
def fit_codebooks(model: MimiModel, latents: Tensor, semantic_dims: int, iterations: int, seed: int) -> list[float]:
    """Fits projections and codebooks in place on latents [frames, width]; returns the error left after each codebook.

    Mimi's semantic and acoustic quantisers both see the latents and their outputs are added, so the two must share the
    space out: the semantic one takes the first `semantic_dims` principal directions (uncentred, because the projections
    have no bias), the acoustic one the directions after them. Errors are mean squares relative to the latents' own.
    """
    from sklearn.cluster import KMeans

    latents, device = latents.cpu(), model.device
    quantizer = model.quantizer.cpu()  # scikit-learn's k-means runs there
    frames, entries = len(latents), model.config.codebook_size
    if frames < entries:
        raise EqknobsError(f"codebooks: {frames} latent frames for {entries} entries; give more speech")
    _, directions = torch.linalg.eigh(latents.double().T @ latents.double())
    directions = directions.flip(1).T.float()  # [width, width], strongest first
    width = model.config.vector_quantization_hidden_dimension
    parts = [
        (quantizer.semantic_residual_vector_quantizer, directions[:semantic_dims]),
        (quantizer.acoustic_residual_vector_quantizer, directions[semantic_dims : semantic_dims + width]),
    ]
    remaining = latents.clone()
    errors = []
    for residual_quantizer, basis in parts:
        projection = F.pad(basis, (0, 0, 0, width - len(basis)))
        residual_quantizer.input_proj.weight.copy_(projection[:, :, None])
        residual_quantizer.output_proj.weight.copy_(projection.T[:, :, None])
        residual = latents @ projection.T
        for number, layer in enumerate(residual_quantizer.layers):
            fit = KMeans(entries, init="random", n_init=1, max_iter=iterations, random_state=seed + number)
            fit.fit(residual[:, : len(basis)].numpy())
            centres = torch.from_numpy(fit.cluster_centers_)
            layer.codebook.embed_sum.copy_(F.pad(centres, (0, width - len(basis))))
            layer.codebook.cluster_usage.fill_(1)
            layer.codebook._embed = None  # transformers caches the quotient of the two buffers
            chosen = layer.codebook.embed[layer.codebook.quantize(residual)]
            residual = residual - chosen
            remaining = remaining - chosen @ projection
            errors.append((remaining.square().mean() / latents.square().mean()).item())
    quantizer.to(device)
    return errors


@torch.no_grad()
def latent_frames(model: MimiModel, clips: list[np.ndarray], limit: int) -> Tensor:
    """Returns up to `limit` latent frames [frames, width] of whole clips taken evenly from the list."""
    size = hop(model)
    found, count = [], 0
    order = np.random.default_rng(0).permutation(len(clips))
    for index in order:
        samples = -(-len(clips[index]) // size) * size
        clip = cut(clips[index], 0, samples)[None, None]
        found.append(encode(model, clip.to(model.device))[0].T.cpu())
        count += len(found[-1])
        if count >= limit:
            break
    return torch.cat(found)[:limit]
