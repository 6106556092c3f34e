"""Networks and images for tests: random weights, random but sane batch normalisation, every branch of the configuration."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.reference import MemNet

# Radius 10: 1 + 2 * 2 * 2 + 1.
SMALL = MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=2)

# Together these take every value of every field at least once, with channels that are no multiple of 16.
VARIANTS: dict[str, MemNetConfig] = {
    "official": SMALL,
    "no_bias": MemNetConfig(channels=5, num_memory_blocks=3, num_recursions=2, bias=False),
    "short_long": MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=3, gate_order="short_long"),
    "colour": MemNetConfig(in_channels=3, out_channels=3, channels=5, num_memory_blocks=2, num_recursions=1),
    "gray_to_colour": MemNetConfig(out_channels=3, channels=16, num_memory_blocks=1, num_recursions=3, recon_kernel=1),
    "unshared": MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=3, sharing="none"),
    "shared_head_bn": MemNetConfig(
        channels=5,
        num_memory_blocks=3,
        num_recursions=2,
        sharing="none",
        gate_order="short_long",
        share_recon_bn=True,
    ),
    "last_output": MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=2, multi_supervised=False),
    "clamped": MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1, clamp=True),
    "chain": MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=3, sharing="chain", recon_kernel=1),
    "chain_of_two": MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=2, sharing="chain"),
    "chain_of_one": MemNetConfig(channels=5, num_memory_blocks=2, num_recursions=1, sharing="chain"),
    "lornatang": MemNetConfig(
        in_channels=3,
        out_channels=3,
        channels=5,
        num_memory_blocks=3,
        num_recursions=2,
        sharing="chain",
        bias=False,
        gate_order="short_long",
        recon_kernel=1,
        multi_supervised=False,
        clamp=True,
    ),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(n: int, channels: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, h, w, generator=generator(seed))


@torch.no_grad()
def randomise(net: MemNet, seed: int = 0, tiny_variance: bool = False) -> MemNet:
    """Random weights, biases and batch normalisations, scaled so that every feature map stays of the order of one.

    Running statistics start from those of a random image and are then moved at random, so that none is what a batch would
    give. tiny_variance: three channels of every normalisation vary so little that eps matters.
    """
    g = generator(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, math.sqrt(2 / fan_in), generator=g)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=g)
        if isinstance(module, nn.BatchNorm2d):
            sign = torch.where(torch.rand(module.num_features, generator=g) < 0.1, -1.0, 1.0)
            module.weight.uniform_(0.6, 1.4, generator=g).mul_(sign)
            module.bias.normal_(0, 0.2, generator=g)
            module.momentum = None  # plain averages: a chain passes each normalisation several times
    # Residual branches of full size make a random deep network amplify every rounding error a hundredfold, which no trained
    # one does; the R * R blocks of a chain would even grow beyond float16.
    depth = net.config.num_memory_blocks * net.config.num_recursions * net.config.num_convs_in_chain
    for block in net.blocks:
        for conv in block.conv_b:
            conv.weight.mul_(min(0.4, 2.4 / math.sqrt(depth)))
    if net.head_weights is not None:
        net.head_weights.normal_(1 / len(net.head_weights), 0.2, generator=g)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    net.train()
    net(image(2, net.config.in_channels, 24, 24, seed).to(net.first.conv.weight.device))
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
            spread = module.running_var.sqrt()
            module.running_mean.add_(spread * 0.2 * torch.randn(module.num_features, generator=g))
            module.running_var.mul_(torch.rand(module.num_features, generator=g) + 0.6)
            if tiny_variance and module.num_features > 3:
                chosen = torch.randperm(module.num_features, generator=g)[:3]
                # The scale stays near one, and would be three times as large without the eps of 1e-5.
                module.running_var[chosen] = 1e-6
                module.weight[chosen] *= 0.0033
    return net


def build(config: MemNetConfig, seed: int = 0, tiny_variance: bool = False) -> MemNet:
    """A reference network in eval mode with random everything."""
    return randomise(MemNet(config), seed, tiny_variance).eval().requires_grad_(False)


def preset(name: str, seed: int = 0) -> MemNet:
    return build(PRESETS[name], seed)


def oracle(net: MemNet, x: Tensor) -> Tensor:
    """The reference in float64. The copy keeps `net` and its parameters as they are."""
    double = MemNet(net.config).double().eval()
    double.load_state_dict(net.state_dict())
    eps = {name: m.eps for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, m in double.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = eps[name]
    with torch.no_grad():
        return double(x.double())
