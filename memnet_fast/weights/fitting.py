"""From the tensors of a file to a network: names, shapes, dtypes, values and sizes are checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointMismatch, CheckpointTooLarge, InputError
from memnet_fast.reference import MemNet

MAX_TENSORS = 4096
MAX_NAME = 500
EPS = 1e-5
FLOATS = ("float16", "bfloat16", "float32", "float64")
BN_LEAVES = ("weight", "bias", "running_mean", "running_var")
# A residual block brings eight tensors of its own.
_MAX_RESIDUAL_BLOCKS = MAX_TENSORS // 8
_MAX_CHANNELS = 1 << 16
# A finite weight beyond this is damage: its square no longer fits a float32.
_LARGEST = 1e15
# A network may need more memory than its file has bytes (float16, tensors that share a storage), but not without limit.
_EXTRA_BYTES = 60 << 20
# Elements that are compared at a time.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. name: as the file calls it; dtype: "float32", ...; read: gives the array, if shape and dtype fit."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        return Stored(self.name, self.dtype, shape, lambda: self.read().reshape(shape))


@dataclass
class Contents:
    """What a reader found in a file.

    tensors: by the names of `MemNet.state_dict()`; names: what the file calls each tensor of the configuration; line: what
    was recognised, for people; problems: what is wrong already; eps: of batch normalisations that differ from 1e-5, by stem;
    reported: tensors whose absence is among the problems already.
    """

    config: MemNetConfig
    tensors: dict[str, Stored]
    names: Mapping[str, str]
    line: str
    problems: list[str] = field(default_factory=list)
    eps: dict[str, float] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)


def tensor_shapes(config: MemNetConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `MemNet(config).state_dict()`, without num_batches_tracked, and without building it.

    Raises CheckpointMismatch for more channels or residual blocks than a file of at most 4096 tensors could hold.
    """
    c, m, r, k = config.channels, config.num_memory_blocks, config.num_recursions, config.recon_kernel
    if max(c, config.in_channels, config.out_channels) > _MAX_CHANNELS:
        raise CheckpointMismatch(f"a network of more than {_MAX_CHANNELS} channels")
    if m * r > _MAX_RESIDUAL_BLOCKS:
        raise CheckpointMismatch(f"{m} memory blocks of {r} recursions are more than a file can hold")
    shapes: dict[str, tuple[int, ...]] = {}

    def bn(stem: str, channels: int) -> None:
        shapes.update({f"{stem}.{leaf}": (channels,) for leaf in BN_LEAVES})

    def conv(stem: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{stem}.weight"] = (out, into, kernel, kernel)
        if config.bias:
            shapes[f"{stem}.bias"] = (out,)

    bn("first.bn", config.in_channels)
    conv("first.conv", c, config.in_channels, 3)
    for i in range(m):
        block = f"blocks.{i}"
        for x in "ab":
            for j in range(1 if config.sharing == "conv" else r):
                conv(f"{block}.conv_{x}.{j}", c, c, 3)
            for j in range(r):
                bn(f"{block}.bn_{x}.{j}", c)
        bn(f"{block}.gate.bn", c * (r + i + 1))
        conv(f"{block}.gate.conv", c, c * (r + i + 1), 1)
    for i in range(m if config.multi_supervised and not config.share_recon_bn else 1):
        bn(f"recon_bn.{i}", c)
    conv("recon", config.out_channels, c, k)
    if config.multi_supervised:
        shapes["head_weights"] = (m,)
    return shapes


def guess_config(shapes: Mapping[str, tuple[int, ...]]) -> MemNetConfig | None:
    """The configuration whose tensors have these names (ours) and shapes, with the usual gate order; None if there is none."""

    def count(start: str, part: str) -> int:
        return len({n[len(start) :].split(".")[0] for n in shapes if n.startswith(start) and part in n})

    first, recon = shapes.get("first.conv.weight", ()), shapes.get("recon.weight", ())
    if len(first) != 4 or len(recon) != 4:
        return None
    r = count("blocks.0.bn_a.", ".running_mean")
    heads = "head_weights" in shapes
    try:
        config = MemNetConfig(
            in_channels=first[1],
            out_channels=recon[0],
            channels=first[0],
            num_memory_blocks=count("blocks.", ".gate."),
            num_recursions=r,
            sharing="conv" if count("blocks.0.conv_a.", ".weight") == 1 else "none",
            bias="first.conv.bias" in shapes,
            recon_kernel=recon[2],
            multi_supervised=heads,
            share_recon_bn=heads and count("blocks.", ".gate.") > 1 == count("recon_bn.", ".weight"),
        )
        return config if tensor_shapes(config) == dict(shapes) else None
    except (InputError, CheckpointMismatch):
        return None


def show_config(config: MemNetConfig, names: Iterable[str] | None = None) -> str:
    """MemNetConfig as one would write it; names: only those fields, otherwise the sizes and what differs from the default."""
    default, values = MemNetConfig().to_dict(), config.to_dict()
    sizes = ("channels", "num_memory_blocks", "num_recursions")
    chosen = [k for k in values if values[k] != default[k] or k in sizes] if names is None else list(names)
    return f"MemNetConfig({', '.join(f'{k}={values[k]!r}' for k in chosen)})"


def short(name: str) -> str:
    """A name from a file for a message: not longer than a line, and without control characters."""
    text = name if len(name) <= 200 else f"{name[:200]}..."
    return text if text.isprintable() else repr(text)[1:-1]


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit, so that NaN equals itself. Piece by piece: copies of whole arrays would add up."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    a, b = first.reshape(-1), second.reshape(-1)
    return all(a[i : i + _PIECE].tobytes() == b[i : i + _PIECE].tobytes() for i in range(0, a.size, _PIECE))


def build(contents: Contents, file_bytes: int, allow_nonfinite: bool) -> MemNet:
    """The network, in eval mode, float32, on the CPU.

    allow_nonfinite: NaN, infinite and huge values and negative variances are loaded as they are.
    Raises CheckpointMismatch with every problem in one message, CheckpointTooLarge.
    """
    shapes = tensor_shapes(contents.config)
    problems = list(contents.problems)
    needed = 4 * sum(math.prod(shape) for shape in shapes.values())
    fits = needed <= file_bytes + _EXTRA_BYTES
    for name, want in shapes.items():
        theirs = short(contents.names.get(name, name))
        stored = contents.tensors.get(name)
        if stored is None:
            if name not in contents.reported:
                problems.append(f"missing {theirs}")
        elif stored.dtype not in FLOATS:
            problems.append(f"{theirs} has dtype {stored.dtype}, a float is needed")
        elif stored.shape != want:
            hint = " (input and output swapped?)" if stored.shape[:2] == want[1::-1] and len(want) == 4 else ""
            problems.append(f"{theirs} has shape {list(stored.shape)}, not {list(want)}{hint}")
        elif fits:
            # Read here to be checked and below to be kept: a copy of everything would be held beside the network.
            value = _float32(stored, contents.eps, name)
            if not allow_nonfinite:
                problems += _bad_values(theirs, value, name.endswith("running_var"))
    if problems:
        raise CheckpointMismatch("; ".join([*problems, _advice(contents, shapes)]))
    if not fits:
        raise CheckpointTooLarge(f"a network of {needed} bytes out of a file of {file_bytes}: its tensors share their memory")
    # Not on the meta device, which would be cheaper, but imports a second's worth of torch when it is used first.
    net = MemNet.on_cpu(contents.config)
    state = net.state_dict()
    for name in shapes:
        state[name].copy_(torch.from_numpy(_float32(contents.tensors[name], contents.eps, name)))
    return net.eval()


def _float32(stored: Stored, eps: Mapping[str, float], name: str) -> np.ndarray:
    """A new, contiguous float32 array. An eps is folded into the variance, as the network adds 1e-5 by itself."""
    stem, _, leaf = name.rpartition(".")
    with np.errstate(over="ignore", invalid="ignore"):
        value = stored.read()
        if leaf == "running_var" and stem in eps:
            value = value.astype(np.float64) + (eps[stem] - EPS)
        return np.array(value, dtype=np.float32, order="C").reshape(stored.shape)


def _bad_values(name: str, value: np.ndarray, variance: bool) -> list[str]:
    if not np.isfinite(value).all():
        return [f"{name} is not finite"]
    if value.size and float(np.abs(value).max()) > _LARGEST:
        return [f"{name} holds values beyond {_LARGEST:g}"]
    if variance and value.size and float(value.min()) < 0:
        return [f"{name} is negative"]
    return []


def _advice(contents: Contents, shapes: dict[str, tuple[int, ...]]) -> str:
    found = {name: stored.shape for name, stored in contents.tensors.items()}
    guess = guess_config(found) if found != shapes else None
    if guess is not None and guess != contents.config:
        ours, wanted = contents.config.to_dict(), guess.to_dict()
        names = [k for k in ours if k not in ("gate_order", "clamp") and ours[k] != wanted[k]]
        return f"the tensors would fit {show_config(guess, names)}"
    return f"it was read as {show_config(contents.config)}"
