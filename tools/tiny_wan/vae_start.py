"""A start for the tiny autoencoder that already knows the principal components of its data.

The encoder is set so that its 16 latents are the first principal components of blocks of 4 frames x 8 x 8 pixels,
found from level to level: 2 x 2 pixels, then 4 x 4 with 2 frames, then 8 x 8 with 4 frames. Its residual branches add
nothing, and the nonlinearity before the last convolution cancels in pairs, silu(x) - silu(-x) = x. The first frame,
which skips the convolutions over time, gets the latents of a clip that stands still. The decoder starts by spreading
the mean colour of every block smoothly; the rest it has to learn.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from wan_ext.whole_vae import WholeClip

ENCODER_LEVEL, DECODER_LEVEL = 30.0, 6.0  # the constant channel that makes a normalisation nearly linear
STILL, BRANCH_GAIN = 1e-4, 0.15


@torch.no_grad()
def principal_start(network: AutoencoderKLWan, videos: Tensor, generator: torch.Generator) -> Tensor:
    """Set every weight of a Wan2.1 autoencoder.

    Args:
        network: four stages, one residual block each, over time in the last two.
        videos: clips to find the components of, [N, 3, T, H, W] in [-1, 1].
        generator: random numbers of the decoder's weights.

    Returns:
        The standard deviation of each latent, [z].
    """
    for parameter in network.parameters():
        parameter.zero_()
    for module in network.modules():
        if hasattr(module, "gamma"):
            module.gamma.fill_(1.0)
    deviation = _encoder(network, videos)
    _decoder(network, videos, generator)
    return deviation


def _encoder(network: AutoencoderKLWan, videos: Tensor) -> Tensor:
    encoder, whole = network.encoder, WholeClip(network)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    _identity(encoder.conv_in.weight[:, :, -1, 1, 1])
    x = nn.functional.conv3d(nn.functional.pad(videos, (1, 1, 1, 1, 2, 0)), encoder.conv_in.weight)
    for layer in encoder.down_blocks:
        if hasattr(layer, "resample"):
            weight = layer.resample[1].weight  # [C, C, 3, 3]
            kept = {16: 12, 32: 24, 48: 32}[weight.shape[0]]
            patches = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2)  # [N, C, 4, T, h, w]
            components = _principal(patches.flatten(1, 2).transpose(0, 1).flatten(1), kept)  # [kept, C 4]
            weight[:kept, :, :2, :2] = components.unflatten(1, (weight.shape[1], 2, 2))
            if layer.mode == "downsample3d":
                _time_components(layer, x, kept)
            x = whole._down(layer, x)
        else:
            if not isinstance(layer.conv_shortcut, nn.Identity) and layer is not encoder.down_blocks[-1]:
                _identity(layer.conv_shortcut.weight[:, :, 0, 0, 0])
            x = whole._residual(layer, x) if layer is not encoder.down_blocks[-1] else x
    return _last_stage(network, x)


def _time_components(layer: nn.Module, x: Tensor, kept: int) -> None:
    """Half sums of two frames for the `kept` spatial components, half differences for the channels left over."""
    conv = layer.resample[1]
    spatial = nn.functional.conv3d(nn.functional.pad(x, (0, 1, 0, 1)), conv.weight[:, :, None], stride=(1, 2, 2))
    difference = (spatial[:, :kept, 2::2] - spatial[:, :kept, 1::2]) / 2  # frames (1, 2), (3, 4), ...
    weight = layer.time_conv.weight[..., 0, 0]  # [C, C, 3]: the frame before, the pair
    _identity(weight[:kept, :kept, 1], 0.5)
    _identity(weight[:kept, :kept, 2], 0.5)
    components = _principal(difference.transpose(0, 1).flatten(1), weight.shape[0] - kept)
    weight[kept:, :kept, 1], weight[kept:, :kept, 2] = -components / 2, components / 2


def _last_stage(network: AutoencoderKLWan, features: Tensor) -> Tensor:
    """Features [N, C, F, h, w] to latents: components scaled between their own size and one, then out in pairs."""
    encoder, z_dim = network.encoder, network.z_dim
    flat = features.transpose(0, 1).flatten(1)
    center = flat.mean(dim=1)
    components = _principal(flat - center[:, None], z_dim)
    deviation = (components @ (flat - center[:, None])).std(dim=1)
    target = deviation.sqrt()
    target = target / target.square().mean().sqrt()
    scaled = components * (target / deviation)[:, None]
    shortcut = encoder.down_blocks[-1].conv_shortcut
    for start, sign in ((0, 1.0), (z_dim, -1.0)):
        shortcut.weight[start : start + z_dim, :, 0, 0, 0] = sign * scaled
        shortcut.bias[start : start + z_dim] = -sign * (scaled @ center)
    shortcut.bias[2 * z_dim] = ENCODER_LEVEL
    width = shortcut.weight.shape[0]
    gain = (ENCODER_LEVEL**2 + 2 * z_dim) ** 0.5 / width**0.5
    out = encoder.conv_out.weight[..., -1, 1, 1]  # [2 z, C]
    _identity(out[:z_dim, :z_dim], gain)
    _identity(out[:z_dim, z_dim : 2 * z_dim], -gain)
    encoder.conv_out.bias[z_dim:] = 2 * torch.log(torch.tensor(STILL))
    _identity(network.quant_conv.weight[..., 0, 0, 0])
    _identity(network.post_quant_conv.weight[..., 0, 0, 0])
    return target


def _decoder(network: AutoencoderKLWan, videos: Tensor, generator: torch.Generator) -> None:
    decoder = network.decoder
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * fan_in**-0.5)
    for name, module in decoder.named_modules():
        if name.endswith(("conv2", "proj")):
            module.weight.mul_(BRANCH_GAIN)

    latents = WholeClip(network).encode(videos)  # [N, z, F, h, w]
    colors = nn.functional.avg_pool3d(videos[:, :, 1:], (4, 8, 8)).transpose(0, 1).flatten(1)  # [3, N]
    known = latents[:, :, 1:].transpose(0, 1).flatten(1)
    known = torch.cat([known, torch.ones_like(known[:1])])
    solution = torch.linalg.lstsq(known.T, colors.T).solution.T  # [3, z + 1]
    decoder.conv_in.weight[:3] = 0
    decoder.conv_in.weight[:3, :, -1, 1, 1] = solution[:, :-1]
    decoder.conv_in.bias[:3] = solution[:, -1]

    smooth = torch.tensor([0.25, 0.5, 0.25])
    for block in decoder.up_blocks:
        shortcut = block.resnets[0].conv_shortcut
        if not isinstance(shortcut, nn.Identity):
            shortcut.weight[:3] = 0
            _identity(shortcut.weight[:3, :3, 0, 0, 0])
        if block.upsamplers is not None:
            layer = block.upsamplers[0]
            if layer.mode == "upsample3d":
                width = layer.time_conv.weight.shape[1]
                for start in (0, width):
                    layer.time_conv.weight[start : start + 3] = 0
                    _identity(layer.time_conv.weight[start : start + 3, :3, -1, 0, 0])
            weight = layer.resample[1].weight
            weight[:3] = 0
            for channel in range(3):
                weight[channel, channel] = torch.outer(smooth, smooth)
    last = decoder.up_blocks[2].upsamplers[0].resample[1]
    last.weight[3:6] = -last.weight[:3]
    last.weight[6] = 0
    last.bias[6] = DECODER_LEVEL
    width = last.weight.shape[0]
    out = decoder.conv_out.weight
    out.mul_(0.05)
    gain = (DECODER_LEVEL**2 + width) ** 0.5 / width**0.5
    for channel in range(3):
        out[channel, channel, -1, 1, 1] += gain
        out[channel, channel + 3, -1, 1, 1] -= gain


def _principal(samples: Tensor, count: int) -> Tensor:
    """The directions [count, C] of most energy of samples [C, N], each with its largest entry positive."""
    moments = (samples.double() @ samples.double().T).float()
    directions = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :count].T
    sign = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    return directions * sign


def _identity(weight: Tensor, gain: float = 1.0) -> None:
    """Write `gain` on the diagonal of a view [out, in]."""
    weight.fill_(0.0)
    weight.diagonal().fill_(gain)
