"""The truth: MemNet in plain PyTorch, operation by operation as published (Tai et al., ICCV 2017, and the Caffe release).

It trains, it runs in any dtype and on any device, and everything fast in this package is held against it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_input(x: Tensor, config: MemNetConfig, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Raises InputError unless x is a dense [N, in_channels, H, W] of one of the dtypes on the device, H and W at least 1."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        raise InputError(f"expected a dense tensor, got layout {x.layout}; call to_dense() or dequantize() first")
    if x.ndim != 4:
        raise InputError(f"expected 4-D [N, C, H, W], got shape {list(x.shape)}")
    if x.shape[1] != config.in_channels:
        raise InputError(f"expected {config.in_channels} channels, got {x.shape[1]} in shape {list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise InputError(f"height and width must be at least 1, got shape {list(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"expected dtype {names}, got {x.dtype}; convert it with x.to(torch.{names.split(',')[0]})")
    if x.device != device and x.device.type != "meta":
        raise InputError(f"the input is on {x.device}, the network on {device}; move one of them with .to()")


class BNReLUConv(nn.Module):
    """The pre-activation unit: batch normalisation, ReLU, convolution with zero padding (applied after the ReLU)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(x)))


class MemoryBlock(nn.Module):
    """One memory block: R recursions (the short-term memory) and the gate over them and all earlier blocks (long-term)."""

    def __init__(self, config: MemNetConfig, index: int) -> None:
        super().__init__()
        c, r = config.channels, config.num_recursions
        convs = 1 if config.sharing == "conv" else r
        self.config = config
        self.conv_a = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=config.bias) for _ in range(convs))
        self.conv_b = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=config.bias) for _ in range(convs))
        self.bn_a = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(r))
        self.bn_b = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(r))
        self.gate = BNReLUConv(c * (r + index + 1), c, 1, config.bias)

    def residual(self, x: Tensor, index: int) -> Tensor:
        """x + conv_b(relu(bn_b(conv_a(relu(bn_a(x))))))   x: [N, C, H, W]"""
        conv = 0 if len(self.conv_a) == 1 else index
        t = self.conv_a[conv](torch.relu(self.bn_a[index](x)))
        return x + self.conv_b[conv](torch.relu(self.bn_b[index](t)))

    def recursions(self, x: Tensor) -> list[Tensor]:
        """H^1 .. H^R of the block whose input is x."""
        short = []
        count = self.config.num_recursions
        for r in range(count):
            if self.config.sharing == "chain":
                for i in range(count):
                    x = self.residual(x, i)
            else:
                x = self.residual(x, r)
            short.append(x)
        return short

    def forward(self, long: list[Tensor]) -> Tensor:
        """long: B_0 .. B_{m-1}, each [N, C, H, W] -> B_m"""
        short = self.recursions(long[-1])
        order = long + short if self.config.gate_order == "long_short" else short + long
        return self.gate(torch.cat(order, 1))


class MemNet(nn.Module):
    """The reference network.

    forward(x): x [N, in_channels, H, W], values in [0, 1], any H, W >= 1 -> [N, out_channels, H, W], dtype and device of x.
    heads(x): the list of outputs y_1 .. y_M that the multi-supervised loss needs (one output otherwise), not weighted.
    """

    def __init__(self, config: MemNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MemNetConfig()
        c, m = config.channels, config.num_memory_blocks
        outputs = m if config.multi_supervised else 1
        self.first = BNReLUConv(config.in_channels, c, 3, config.bias)
        self.blocks = nn.ModuleList(MemoryBlock(config, i) for i in range(m))
        self.recon_bn = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(1 if config.share_recon_bn else outputs))
        k = config.recon_kernel
        self.recon = nn.Conv2d(c, config.out_channels, k, padding=k // 2, bias=config.bias)
        if config.multi_supervised:
            self.head_weights = nn.Parameter(torch.full((m,), 1.0 / m))
        else:
            self.register_parameter("head_weights", None)
        self.reset_parameters()

    @classmethod
    def on_cpu(cls, config: MemNetConfig) -> MemNet:
        """A new network in float32 on the CPU, whatever default dtype and device the program has set."""
        with torch.device("cpu"):
            return cls(config).float()

    def reset_parameters(self) -> None:
        """He initialisation, biases 0; batch normalisation 1 and 0."""
        for module in self.modules():
            # Without values there is nothing to draw, and on "meta" drawing makes torch load its compiler, which takes seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def heads(self, x: Tensor) -> list[Tensor]:
        weight = self.first.conv.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        check_input(x, self.config, FLOATS if autocast else (weight.dtype,), weight.device)
        long = [self.first(x)]
        for block in self.blocks:
            long.append(block(long))
        outputs = long[1:] if self.config.multi_supervised else long[-1:]
        bns = list(self.recon_bn) * (len(outputs) // len(self.recon_bn))
        return [x + self.recon(torch.relu(bn(b))) for bn, b in zip(bns, outputs, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads(x)
        y = heads[0]
        if self.head_weights is not None:
            y = torch.stack([w * h for w, h in zip(self.head_weights, heads, strict=True)]).sum(0)
        return y.clamp(0, 1) if self.config.clamp else y


def count_macs(config: MemNetConfig) -> int:
    """Multiply-adds of the convolutions for each pixel, all outputs included."""
    c, m, r = config.channels, config.num_memory_blocks, config.num_recursions
    first = 9 * config.in_channels * c
    recursions = m * r * config.num_convs_in_chain * 2 * 9 * c * c
    gates = sum((r + i) * c * c for i in range(1, m + 1))
    outputs = m if config.multi_supervised else 1
    return first + recursions + gates + outputs * config.recon_kernel**2 * c * config.out_channels
