"""What a network's weights are multiplied with, measured while it runs: for error-compensated rounding (`gptq`)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eqknobs.errors import EqknobsError

LARGEST = 4096  # columns: the second moments of more would take more memory than the weights


@contextmanager
def input_moments(net: nn.Module, names: Iterable[str], largest: int = LARGEST) -> Iterator[dict[str, Tensor]]:
    """While the block runs the network on calibration data, sum up the second moments of what meets each weight.

    names: of tensors, as in a plan. After the block the dictionary holds, by name, the mean of x xᵀ, float64
    [columns, columns], over all x that a row of the weight's matrix was multiplied with. Tensors of other modules than
    linears and one-dimensional convolutions without groups, with more than `largest` columns, or that did not run, are
    left out. Raises EqknobsError for a tensor that the network does not have.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            try:
                module: Any = net.get_submodule(owner)
            except AttributeError as error:
                raise EqknobsError(f"calibration: the network has no tensor {name}") from error
            rows_of = _inputs_of(module)
            if rows_of is None or leaf != "weight" or module.weight.numel() // _rows(module) > largest:
                continue

            def add(module: Any, inputs: Any, name: str = name, rows_of: Any = rows_of) -> None:
                rows = rows_of(module, inputs[0].detach()).float()
                sums[name] = sums.get(name, 0) + (rows.T @ rows).double()
                counts[name] = counts.get(name, 0) + len(rows)

            stack.callback(module.register_forward_pre_hook(add).remove)
        found: dict[str, Tensor] = {}
        yield found
    found |= {name: total / counts[name] for name, total in sums.items()}


def _rows(module: Any) -> int:
    return module.weight.shape[int(isinstance(module, nn.ConvTranspose1d))]


def _inputs_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """What gives the vectors [n, columns] that meet a module's weight; None: the module is of no such kind."""
    if isinstance(module, nn.Linear):
        return lambda _module, x: x.reshape(-1, x.shape[-1])
    if isinstance(module, nn.Conv1d) and module.groups == 1 and not isinstance(module.padding, str):
        return _of_convolution
    if isinstance(module, nn.ConvTranspose1d) and module.groups == 1:
        return _of_transposed
    return None


def _of_convolution(module: nn.Conv1d, x: Tensor) -> Tensor:
    if module.padding_mode != "zeros":
        raise EqknobsError(f"calibration: convolutions padded with {module.padding_mode} are not known")
    return _windows(x, module.kernel_size[0], module.dilation[0], module.stride[0], int(module.padding[0]))


def _of_transposed(module: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """A transposed convolution is one of the input with zeros in between, its kernel turned round."""
    kernel, stride, dilation = module.kernel_size[0], module.stride[0], module.dilation[0]
    spread = x.new_zeros(*x.shape[:-1], (x.shape[-1] - 1) * stride + 1)
    spread[..., ::stride] = x
    windows = _windows(spread, kernel, dilation, 1, dilation * (kernel - 1))
    return windows.unflatten(1, (-1, kernel)).flip(-1).flatten(1)


def _windows(x: Tensor, kernel: int, dilation: int, stride: int, padding: int) -> Tensor:
    """[n, channels * kernel] of [batch, channels, time], channel by channel."""
    x = nn.functional.pad(x if x.dim() == 3 else x[None], (padding, padding))
    spans = x.unfold(-1, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return spans.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def compensated(
    matrix: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, moments: Tensor, damping: float = 0.01, block: int = 128
) -> Tensor:
    """Round a matrix [rows, columns] column by column, so that later columns make up for what earlier ones are off
    (GPTQ, Frantar et al. 2023, arXiv 2210.17323); returns round(w / scale) within bottom and top, float32.

    scale, bottom, top: [rows, columns] or broadcast to it; moments: of the columns' inputs [columns, columns]; damping:
    share of their mean that is added to the diagonal.
    """
    weights = matrix.double()
    scale, bottom, top = (value.double().expand(weights.shape) for value in (scale, bottom, top))
    moments = moments.to(weights).clone()
    diagonal = moments.diagonal()
    diagonal.add_(damping * diagonal.mean())
    diagonal.copy_(torch.where(diagonal == 0, 1, diagonal))  # inputs that are always 0
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    codes = torch.empty_like(weights)
    columns = weights.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(len(weights), stop - start, dtype=weights.dtype, device=weights.device)
        for j in range(start, stop):
            code = (weights[:, j] / scale[:, j]).round().clamp(bottom[:, j], top[:, j])
            codes[:, j] = code
            error = (weights[:, j] - code * scale[:, j]) / inverse[j, j]
            weights[:, j + 1 : stop] -= error[:, None] * inverse[j, j + 1 : stop]
            errors[:, j - start] = error
        weights[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes.float()
