"""Layer L1: networks whose every intermediate value is an integer of at most 256.

Then no precision rounds anything (bfloat16 holds integers up to 256), no order of summation matters, and any right
implementation equals float64 bit by bit, over all layers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from memnet_fast.config import MemNetConfig
from memnet_fast.plan import lower
from memnet_fast.reference import MemNet
from support.interpreter import Interpreter
from support.networks import generator, oracle

LARGEST = 256


def _sparse(shape: torch.Size, nonzero: int, g: torch.Generator) -> Tensor:
    """Weights [out, in, k, k] of 0 and +-1, with so many ones in each output channel."""
    out = shape[0]
    flat = torch.zeros(out, shape[1:].numel())
    for row in flat:
        chosen = torch.randperm(row.numel(), generator=g)[:nonzero]
        row[chosen] = torch.randint(0, 2, (len(chosen),), generator=g) * 2.0 - 1
    return flat.reshape(shape)


def _bound(bn: nn.BatchNorm2d, x: Tensor, g: torch.Generator) -> None:
    """Statistics that bring relu(bn(x)) into 0..k, k from 3 to 6 and different for each channel.

    sqrt(variance + eps) is 1 or 2, gamma +-1 or +-2, so that scale and shift are integers; a wrong eps, a missing root, a
    lost mean, gamma or beta makes other numbers.
    """
    count = bn.num_features
    twice = torch.rand(count, generator=g) < 0.5
    sign = torch.where(torch.rand(count, generator=g) < 0.3, -1.0, 1.0)
    bn.running_var.copy_(torch.where(twice, 3.75, 0.75))
    bn.weight.copy_(sign * torch.where(twice, 2.0, 1.0))
    flat = x.transpose(0, 1).reshape(count, -1)
    largest = torch.where(sign > 0, flat.amax(1), -flat.amin(1)).to(bn.bias.dtype)
    shift = torch.randint(3, 7, (count,), generator=g) - largest
    bn.bias.copy_(torch.randint(-2, 3, (count,), generator=g))
    bn.running_mean.copy_(sign * (bn.bias - shift))


@torch.no_grad()
def integer_network(config: MemNetConfig, x: Tensor, seed: int = 0) -> MemNet:
    """A network for image x [N, C_in, H, W] of small integers. Batch normalisations are set on its way through."""
    g = generator(seed)
    net = MemNet(config).double().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(_sparse(module.weight.shape, 8 if module.kernel_size == (3, 3) else 12, g))
            if module.bias is not None:
                module.bias.copy_(torch.randint(-3, 4, module.bias.shape, generator=g))
    if net.head_weights is not None:
        m = len(net.head_weights)
        net.head_weights.copy_(torch.tensor([(-1.0) ** i * (1 + i % 3) for i in range(m)]))
    done = set()

    def before(module: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
        if module not in done:  # a chain comes by several times
            done.add(module)
            _bound(module, args[0], g)

    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in norms:
        module.eps = 0.25
    handles = [m.register_forward_pre_hook(before) for m in norms]
    net(x.double())
    for handle in handles:
        handle.remove()
    return net.float().requires_grad_(False)


def largest_value(net: MemNet, x: Tensor) -> float:
    """Largest magnitude among the stored maps of a run; raises if one of them is not an integer."""
    found = [0.0]

    class _Watched(Interpreter):
        def store(self, value: Tensor) -> Tensor:
            if not torch.equal(value, value.round()):
                raise AssertionError("a feature map is not an integer")
            found.append(float(value.abs().max()))
            return value

    _Watched(lower(net))(x)
    return max(found)


@lru_cache(maxsize=8)
def case(config: MemNetConfig, n: int = 2, h: int = 19, w: int = 23, seed: int = 0) -> tuple[MemNet, Tensor, Tensor]:
    """(network, image, exact result in float64)"""
    x = torch.randint(0, 8, (n, config.in_channels, h, w), generator=generator(seed + 100)).float()
    net = integer_network(config, x, seed)
    if not 8 <= largest_value(net, x) <= LARGEST:
        raise AssertionError(f"the integer network reaches {largest_value(net, x)}")
    return net, x, oracle(net, x)
