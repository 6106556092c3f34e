"""`MemNetConfig`: the few numbers that tell one member of the MemNet family from another, and the named presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from memnet_fast.errors import InputError

Sharing = Literal["conv", "none", "chain"]
GateOrder = Literal["long_short", "short_long"]


@dataclass(frozen=True)
class MemNetConfig:
    """Hyper-parameters of a MemNet. The defaults are the official M6R6 (80 layers).

    in_channels, out_channels: planes of the image; equal, unless in_channels is 1 (its global skip is then broadcast).
    channels: width of every feature map.
    num_memory_blocks (M), num_recursions (R).
    sharing: "conv": the two convolutions of a block serve all its recursions (official); "none": each recursion has its own;
        "chain": R residual blocks with their own convolutions form a chain that is applied R times (Lornatang's port).
        Batch normalisation is never shared between the residual blocks.
    bias: convolutions have biases.
    gate_order: order of the gate's inputs, [long, short] (official) or [short, long] (the paper's equation 8 and most ports).
    recon_kernel: 3 or 1, size of the reconstruction convolution.
    multi_supervised: every memory block has an output, and the result is their sum weighted by learned scalars.
    share_recon_bn: the outputs of a multi-supervised network share one batch normalisation (wutianyiRosun's port).
    clamp: the result is clamped to [0, 1].

    Raises InputError for values that make no network.
    """

    in_channels: int = 1
    out_channels: int = 1
    channels: int = 64
    num_memory_blocks: int = 6
    num_recursions: int = 6
    sharing: Sharing = "conv"
    bias: bool = True
    gate_order: GateOrder = "long_short"
    recon_kernel: int = 3
    multi_supervised: bool = True
    share_recon_bn: bool = False
    clamp: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "channels", "num_memory_blocks", "num_recursions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("bias", "multi_supervised", "share_recon_bn", "clamp"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, allowed in (
            ("sharing", get_args(Sharing)),
            ("gate_order", get_args(GateOrder)),
            ("recon_kernel", (3, 1)),
        ):
            if getattr(self, name) not in allowed or isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if self.in_channels not in (1, self.out_channels):
            raise InputError(
                f"in_channels must be 1 or equal out_channels, because the image is added to the output; "
                f"got {self.in_channels} and {self.out_channels}"
            )
        if self.share_recon_bn and not self.multi_supervised:
            raise InputError("share_recon_bn needs multi_supervised=True: with one output there is nothing to share")

    @property
    def num_convs_in_chain(self) -> int:
        """Residual blocks between two short-term memories."""
        return self.num_recursions if self.sharing == "chain" else 1

    @property
    def receptive_radius(self) -> int:
        """Pixels that an output pixel sees in each direction: one for each 3x3 convolution on the longest path."""
        residual_blocks = self.num_memory_blocks * self.num_recursions * self.num_convs_in_chain
        return 1 + 2 * residual_blocks + (self.recon_kernel == 3)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemNetConfig:
        """Raises InputError that names every unknown key."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown configuration: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)


_PORT_A = {"sharing": "none", "bias": False, "gate_order": "short_long", "multi_supervised": False}

PRESETS: dict[str, MemNetConfig] = {
    "memnet_m6r6": MemNetConfig(),
    "memnet_m10r10": MemNetConfig(num_memory_blocks=10, num_recursions=10),
    "memnet_m6r6_vandermode": MemNetConfig.from_dict(_PORT_A),
    "memnet_m6r6_lornatang": MemNetConfig.from_dict(
        {**_PORT_A, "in_channels": 3, "out_channels": 3, "sharing": "chain", "recon_kernel": 1, "clamp": True}
    ),
}
