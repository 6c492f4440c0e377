"""The codec in transformers' architecture: how it begins, and its two halves without the quantiser."""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MimiConfig, MimiModel


def new_model(config: dict[str, Any], seed: int) -> MimiModel:
    """Builds a MimiModel with unit-gain normal weights: variance 1 / fan-in for every convolution and linear layer.

    With PyTorch's default initialisation of the same layers the loss stands still for thousands of steps.
    """
    torch.manual_seed(seed)
    model = MimiModel(MimiConfig(**config))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.ConvTranspose1d):
                taps = module.kernel_size[0] / module.stride[0]
                module.weight.normal_(0, (module.in_channels / module.groups * taps) ** -0.5)
            elif isinstance(module, nn.Conv1d | nn.Linear):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and module.bias is not None:
                module.bias.zero_()
    return model


def hop(model: MimiModel) -> int:
    """Samples per code frame: the encoder's stride with its downsampling."""
    return round(model.config.sampling_rate / model.config.frame_rate)


def channels_last(model: MimiModel) -> None:
    """Runs the convolutions as 2-d ones in channels-last order: equal but for rounding, a quarter faster on a CPU."""

    def layout(x: Tensor) -> Tensor:
        return x.unsqueeze(2).contiguous(memory_format=torch.channels_last)

    def conv(self: nn.Conv1d, x: Tensor) -> Tensor:
        stride, dilation = (1, self.stride[0]), (1, self.dilation[0])
        return F.conv2d(layout(x), self.weight.unsqueeze(2), self.bias, stride, 0, dilation, self.groups).squeeze(2)

    def transposed(self: nn.ConvTranspose1d, x: Tensor) -> Tensor:
        weight = self.weight.unsqueeze(2)
        return F.conv_transpose2d(layout(x), weight, self.bias, (1, self.stride[0]), groups=self.groups).squeeze(2)

    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            vars(module)["forward"] = types.MethodType(conv, module)
        elif isinstance(module, nn.ConvTranspose1d):
            vars(module)["forward"] = types.MethodType(transposed, module)


def encode(model: MimiModel, audio: Tensor) -> Tensor:
    """Returns the continuous latents [batch, width, frames] at the code rate of audio [batch, 1, samples]."""
    if "downsample" in model._modules:  # transformers before 5.21
        hidden = model.encoder_transformer(model.encoder(audio).transpose(1, 2))[0]
        return model.downsample(hidden.transpose(1, 2))
    return model.encoder(audio).latents


def decode(model: MimiModel, latents: Tensor) -> Tensor:
    """Returns audio [batch, 1, samples] from latents [batch, width, frames] at the code rate."""
    if "upsample" in model._modules:  # transformers before 5.21
        hidden = model.decoder_transformer(model.upsample(latents).transpose(1, 2))[0]
        return model.decoder(hidden.transpose(1, 2))
    return model.decoder(latents).audio_values
