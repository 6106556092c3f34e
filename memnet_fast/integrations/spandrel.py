"""MemNet for spandrel, and so for the programs that open models through it (chaiNNer, ComfyUI and others):

    from memnet_fast.integrations import spandrel
    spandrel.install()

Afterwards `spandrel.ModelLoader().load_from_file(path)` opens weight files of this package and of the ports. A .caffemodel or
MXNet's .params is converted first (`memnet convert`), as spandrel reads files by itself, and only .pth, .pt and .safetensors.

spandrel sees names and shapes of tensors, but no metadata. Of the files of this package it therefore opens those with the
tensors of the official network, and takes them for it (gate order [long, short], no clamp); for the others it needs the port's
own file.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memnet_fast import weights
from memnet_fast.errors import CheckpointMismatch, MissingExtra
from memnet_fast.reference import MemNet
from memnet_fast.restore.color import LUMA
from memnet_fast.weights.ports import strip_prefixes

try:
    from spandrel import MAIN_REGISTRY, Architecture, ArchRegistry, ArchSupport, ImageModelDescriptor
except ImportError as error:
    raise MissingExtra(f"spandrel cannot be imported ({error}); pip install memnet_fast[spandrel]") from error

# Names that only a MemNet has: of this package, of the ports A and A', of port B.
_NAMES = (
    {"first.bn.running_var", "first.conv.weight", "blocks.0.bn_a.0.weight", "blocks.0.gate.conv.weight", "recon.weight"},
    {
        "feature_extractor.bn.running_var",
        "feature_extractor.conv.weight",
        "dense_memory.0.recursive_unit.0.relu_conv1.conv.weight",
        "dense_memory.0.gate_unit.conv.weight",
        "reconstructor.conv.weight",
    },
    {
        "feature_extractor.0.running_var",
        "feature_extractor.2.weight",
        "dense_memory_blocks.0.recursive_unit.0.residual_block.2.weight",
        "dense_memory_blocks.0.gate_unit.2.weight",
        "reconstructor.2.weight",
    },
)


class MemNetArch(Architecture):
    """How spandrel recognises and loads a MemNet of any size."""

    def __init__(self) -> None:
        super().__init__(id="MemNet", detect=_is_memnet)

    def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor:
        """Raises CheckpointMismatch, which lists every problem."""
        net = weights.from_state_dict(state_dict).net
        config = net.config
        return ImageModelDescriptor(
            net,
            net.state_dict(),
            architecture=self,
            purpose="Restoration",
            tags=[f"M{config.num_memory_blocks}R{config.num_recursions}", f"{config.channels}nf"],
            # The image itself goes through the network, which must not round it to eleven bits or less.
            supports_half=False,
            supports_bfloat16=False,
            scale=1,
            input_channels=config.in_channels,
            output_channels=config.out_channels,
            call_fn=_restore,
        )


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Registers MemNet. More than once does no harm."""
    registry.add(ArchSupport.from_architecture(MemNetArch()), ignore_duplicates=True)


def _is_memnet(state_dict: dict[str, Any]) -> bool:
    try:
        short_names, _ = strip_prefixes(name for name in state_dict if isinstance(name, str))
    except CheckpointMismatch:  # two names become one
        return False
    found = set(short_names.values())
    return any(names <= found for names in _NAMES)


def _restore(net: MemNet, image: Tensor) -> Tensor:
    """image: [N, C, H, W]. Programs that know only colour images give three channels to a network for one: then luma is
    restored, and chroma kept, as `memnet denoise` does."""
    if image.shape[1] != 3 or (net.config.in_channels, net.config.out_channels) != (1, 1):
        return net(image)
    luma = LUMA[0] * image[:, :1] + LUMA[1] * image[:, 1:2] + LUMA[2] * image[:, 2:]
    return image + (net(luma) - luma)
