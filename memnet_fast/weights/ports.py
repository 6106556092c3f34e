"""State dicts of the PyTorch ports: recognised by names and shapes, and renamed.

A: Vandermode/pytorch-MemNet and its relatives (QRNN3D, HSIR, HyDe, EDSR forks); A': the same with biases, one reconstruction
for all blocks and learned `weights` (wutianyiRosun, yydlmzyz); B: Lornatang/MemNet-PyTorch, whose chain of residual blocks is
applied R times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointMismatch, CheckpointTooLarge, InputError
from memnet_fast.weights.fitting import MAX_NAME, Contents, Stored, short, tensor_shapes

_ROOTS = {"feature_extractor", "reconstructor", "dense_memory", "dense_memory_blocks", "weights"}
_MAX_PREFIXES = 16
_OURS = {"first", "blocks", "recon", "recon_bn", "head_weights"}
_WRAPPERS = ("module", "net", "model", "_orig_mod")

# Our stem -> theirs. {m} and {r} count from 0.
_STEMS_A = {
    "first.bn": "feature_extractor.bn",
    "first.conv": "feature_extractor.conv",
    "blocks.{m}.bn_a.{r}": "dense_memory.{m}.recursive_unit.{r}.relu_conv1.bn",
    "blocks.{m}.conv_a.{r}": "dense_memory.{m}.recursive_unit.{r}.relu_conv1.conv",
    "blocks.{m}.bn_b.{r}": "dense_memory.{m}.recursive_unit.{r}.relu_conv2.bn",
    "blocks.{m}.conv_b.{r}": "dense_memory.{m}.recursive_unit.{r}.relu_conv2.conv",
    "blocks.{m}.gate.bn": "dense_memory.{m}.gate_unit.bn",
    "blocks.{m}.gate.conv": "dense_memory.{m}.gate_unit.conv",
    "recon_bn.0": "reconstructor.bn",
    "recon": "reconstructor.conv",
}
_STEMS_B = {
    "first.bn": "feature_extractor.0",
    "first.conv": "feature_extractor.2",
    "blocks.{m}.bn_a.{r}": "dense_memory_blocks.{m}.recursive_unit.{r}.residual_block.0",
    "blocks.{m}.conv_a.{r}": "dense_memory_blocks.{m}.recursive_unit.{r}.residual_block.2",
    "blocks.{m}.bn_b.{r}": "dense_memory_blocks.{m}.recursive_unit.{r}.residual_block.3",
    "blocks.{m}.conv_b.{r}": "dense_memory_blocks.{m}.recursive_unit.{r}.residual_block.5",
    "blocks.{m}.gate.bn": "dense_memory_blocks.{m}.gate_unit.0",
    "blocks.{m}.gate.conv": "dense_memory_blocks.{m}.gate_unit.2",
    "recon_bn.0": "reconstructor.0",
    "recon": "reconstructor.2",
}
_BLOCK = re.compile(r"dense_memory(?:_blocks)?\.(\d{1,4})\.(?:recursive_unit\.(\d{1,4})\.)?")


def strip_prefixes(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Names in the file -> names without what DataParallel, torch.compile and trainers put in front, and what that was.

    Raises CheckpointMismatch if two names become one.
    """
    short_names = {name: name for name in names}
    removed: list[str] = []

    def rename(part: str, change: Any) -> None:
        if part not in removed:
            removed.append(part)
        short_names.update({k: change(v) for k, v in short_names.items()})

    if any("_orig_mod." in v for v in short_names.values()):  # also inside, where a part of a network was compiled
        rename("_orig_mod.", lambda v: v.replace("_orig_mod.", ""))
    for _ in range(_MAX_PREFIXES):
        heads = {v.partition(".")[0] for v in short_names.values()}
        wrapper = next((w for w in _WRAPPERS if any(v.startswith(f"{w}.") for v in short_names.values())), None)
        if wrapper:
            rename(f"{wrapper}.", lambda v, w=wrapper: v.removeprefix(f"{w}."))
        elif len(heads) == 1 and not heads & (_ROOTS | _OURS) and all("." in v for v in short_names.values()):
            rename(f"{heads.pop()}.", lambda v: v.partition(".")[2])
        else:
            break
    doubled = len(short_names) - len(set(short_names.values()))
    if doubled:
        raise CheckpointMismatch(f"{doubled} names appear twice once {', '.join(map(short, removed))} is removed")
    return short_names, removed


def read(stored: dict[str, Stored], eps: dict[str, float], where: list[str]) -> Contents:
    """stored: tensors by the names in the file; eps: of batch normalisations that state one; where: containers around them.

    Raises CheckpointMismatch if the names are not those of a port, CheckpointTooLarge for absurdly long ones.
    """
    if max(map(len, stored), default=0) > MAX_NAME:
        raise CheckpointTooLarge(f"a tensor whose name is longer than {MAX_NAME} characters")
    renamed, removed = strip_prefixes(stored)
    theirs = {new: stored[old] for old, new in renamed.items() if not new.endswith("num_batches_tracked")}
    roots = {name.partition(".")[0] for name in theirs}
    if not roots & _ROOTS:
        if len(roots & _OURS) > 1:
            raise CheckpointMismatch(
                "a state_dict of this package does not say its configuration; store the network with save_weights instead"
            )
        found = ", ".join(short(n) for n in sorted(theirs)[:4])
        raise CheckpointMismatch(f"its tensors ({found}, ...) are not named as in a known port of MemNet")
    b = "dense_memory_blocks" in roots or any(n.startswith(("feature_extractor.2", "reconstructor.2")) for n in theirs)
    stems = _STEMS_B if b else _STEMS_A
    config = _config(theirs, stems, b)
    tensors, names = {}, {}
    for ours in tensor_shapes(config):
        name = "weights" if ours == "head_weights" else _their_name(ours, stems)
        names[ours] = name
        if name in theirs:
            tensors[ours] = theirs.pop(name)
    head = tensors.get("head_weights")
    if head is not None and head.shape in ((1, config.num_memory_blocks), (config.num_memory_blocks, 1)):
        tensors["head_weights"] = head.reshaped((config.num_memory_blocks,))
    problems = [f"unexpected {short(name)}" for name in sorted(theirs)]
    stem_eps = {ours.rpartition(".")[0]: names[ours].rpartition(".")[0] for ours in names}
    found_eps = {renamed_stem: value for stem, value in eps.items() for renamed_stem in [_stem_after(stem, renamed)]}
    own_eps = {ours: found_eps[name] for ours, name in stem_eps.items() if name in found_eps}
    problems += [f"{stem} has eps {value}" for stem, value in own_eps.items() if not 0 <= value < math.inf]
    port = "B (Lornatang)" if b else "A' (learned weights)" if config.multi_supervised else "A (Vandermode)"
    line = (
        f"port {port}, M{config.num_memory_blocks}R{config.num_recursions}, {config.channels} channels, "
        f"{config.in_channels} -> {config.out_channels}, {'with' if config.bias else 'no'} biases, "
        f"{config.recon_kernel}x{config.recon_kernel} reconstruction"
        + (f"; in {' of '.join(repr(short(w)) for w in reversed(where))}" if where else "")
        + (f"; without prefix {' '.join(map(short, removed))}" if removed else "")
    )
    return Contents(config, tensors, names, line, problems, own_eps)


def _stem_after(stem: str, renamed: dict[str, str]) -> str:
    return renamed.get(f"{stem}.running_var", stem).removesuffix(".running_var")


def _their_name(ours: str, stems: dict[str, str]) -> str:
    stem, _, leaf = ours.rpartition(".")
    parts = stem.split(".")
    values = {}
    if parts[0] == "blocks":
        values["m"], parts[1] = parts[1], "{m}"
        if len(parts) == 4 and parts[2] != "gate":
            values["r"], parts[3] = parts[3], "{r}"
    return f"{stems['.'.join(parts)].format(**values)}.{leaf}"


def _config(theirs: dict[str, Stored], stems: dict[str, str], b: bool) -> MemNetConfig:
    blocks, recursions = [0], [0]
    for name in theirs:
        match = _BLOCK.match(name)
        if match:
            blocks.append(int(match[1]))
            recursions.append(int(match[2] or 0))

    def shape(stem: str) -> tuple[int, ...] | None:
        stored = theirs.get(f"{stems[stem]}.weight")
        return stored.shape if stored is not None and len(stored.shape) == 4 else None

    first, recon = shape("first.conv"), shape("recon")
    convs = [stem.replace("{m}", "0").replace("{r}", "0") for stem in stems if stem == "recon" or "conv" in stem]
    out = recon[0] if recon else first[1] if first else 1
    width = first[0] if first else recon[1] if recon else 64
    try:
        config = MemNetConfig(
            in_channels=first[1] if first else out,
            out_channels=out,
            channels=width,
            num_memory_blocks=max(blocks) + 1,
            num_recursions=max(recursions) + 1,
            sharing="chain" if b else "none",
            bias=any(_their_name(f"{stem}.bias", stems) in theirs for stem in convs),
            gate_order="short_long",
            recon_kernel=recon[2] if recon and recon[2] in (1, 3) else 1 if b else 3,
            multi_supervised="weights" in theirs,
            share_recon_bn="weights" in theirs,
            clamp=b,
        )
    except InputError as error:
        raise CheckpointMismatch(f"its tensors make no MemNet: {error}") from error
    return config
