"""Networks for other programs: ONNX, and PyTorch's own exported programs (.pt2).

Both take one image [N, in_channels, H, W] of float32 in [0, 1], any N, H, W >= 1, and give one of the same size; both were made
from the reference, hold their weights, and are compared with it before a file appears. Neither needs this package to run. The
same network gives the same bytes, and no path of the machine it was made on is inside.

ONNX: input `image`, output `restored`, which is clamped to [0, 1], as programs that run such files write it into a picture.
.pt2: `torch.export.load(file).module()(image)` is the reference itself, which is not clamped.
Metadata: `config` and `info` (JSON) and `sha256` (of the tensors, as in our own weight files); in .pt2, the extra file
memnet_fast.json holds them.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from memnet_fast import __version__
from memnet_fast.errors import MissingExtra, OutputError
from memnet_fast.files import write_whole
from memnet_fast.reference import MemNet
from memnet_fast.weights import digest

if TYPE_CHECKING:
    import onnx

# The oldest that PyTorch writes without converting, and the version of the format that came with it: ONNX Runtime reads both
# since 1.14.
_OPSET, _IR_VERSION = 18, 8
_EXTRA_FILE = "memnet_fast.json"
# [N, H, W] of the comparison: one pixel, one row, and sizes that are odd, prime and different.
_SIZES = ((1, 1, 1), (2, 1, 7), (1, 13, 5), (3, 9, 16), (1, 33, 31))


class _Clamped(nn.Module):
    def __init__(self, net: MemNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image).clamp(0, 1)


class _Named(nn.Module):
    """The reference; its argument is called as in the ONNX file."""

    def __init__(self, net: MemNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def export_onnx(net: MemNet, path: str | os.PathLike[str], info: Mapping[str, Any] | None = None) -> None:
    """Writes an ONNX file, whole or not at all, after ONNX Runtime has given what the reference gives.

    net: in eval mode or not, it is exported as in eval mode, in float32. info: stored as JSON.
    Raises MissingExtra without onnx, onnxscript and onnxruntime; OutputError if ONNX Runtime computes something else, if a
    result is not finite, or if the file cannot be written.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it, and would say so less clearly)
    except ImportError as error:
        raise MissingExtra(f"ONNX needs more packages ({error}); pip install memnet_fast[onnx]") from error
    net = _prepared(net)
    with _quiet():
        exported = torch.onnx.export(
            _program(_Clamped(net), net.config.in_channels),
            input_names=["image"],
            output_names=["restored"],
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    model = _cleaned(exported.model_proto, _metadata(net, info))
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["restored"], {"image": image.numpy()})[0])

    _compare(run, _Clamped(net), net.config.in_channels, "ONNX Runtime")
    write_whole(Path(path), data)


def export_program(net: MemNet, path: str | os.PathLike[str], info: Mapping[str, Any] | None = None) -> None:
    """Writes a torch.export program (.pt2) of the reference, whole or not at all.

    net: in eval mode or not, it is exported as in eval mode, in float32. info: stored as JSON.
    Raises OutputError if the program, read back, computes something else, if a result is not finite, or if the file cannot be
    written.
    """
    net = _prepared(net)
    buffer = io.BytesIO()
    with _quiet():
        program = _program(_Named(net), net.config.in_channels)
        torch.export.save(program, buffer, extra_files={_EXTRA_FILE: json.dumps(_metadata(net, info), sort_keys=True)})
        data = buffer.getvalue()
        back = torch.export.load(io.BytesIO(data)).module()
    _compare(back, net, net.config.in_channels, "the exported program")
    write_whole(Path(path), data)


def _prepared(net: MemNet) -> MemNet:
    """A copy, so that the caller's network keeps its device, dtype and mode."""
    return deepcopy(net).cpu().float().eval().requires_grad_(False)


def _metadata(net: MemNet, info: Mapping[str, Any] | None) -> dict[str, str]:
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    return {
        "config": json.dumps(net.config.to_dict(), sort_keys=True),
        "info": json.dumps(dict(info or {}), sort_keys=True),
        "sha256": digest(tensors),
        "made_by": f"memnet_fast {__version__}",
    }


def _program(module: nn.Module, channels: int) -> ExportedProgram:
    shapes = {"image": {0: Dim("N", min=1), 2: Dim("H", min=1), 3: Dim("W", min=1)}}
    # Sizes of one would be taken for constants.
    example = torch.zeros(2, channels, 9, 11)
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # file names of this machine
    return program


def _cleaned(model: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Without the notes of the exporter (file names of this machine are among them), with ours."""
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]  # shapes in names that mean nothing; every reader infers them
    del model.graph.metadata_props[:], model.metadata_props[:]
    model.graph.name, model.graph.doc_string, model.doc_string = "memnet", "", ""
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "memnet_fast", __version__
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        for i, name in ((0, "N"), (2, "H"), (3, "W")):
            dimensions[i].dim_param = name
    for key, text in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=text)
    return model


def _compare(run: Callable[[Tensor], Tensor], reference: nn.Module, channels: int, who: str) -> None:
    """Against float64: twice the largest error of PyTorch in float32, whose sums have another order, and four of float32's
    rounding units for where that happens to be none."""
    double = deepcopy(reference).double()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(n, channels, h, w, generator=generator) for n, h, w in _SIZES]
    with torch.no_grad():
        truths = [double(x.double()) for x in images]
        own = max(float((reference(x).double() - truth).abs().max()) for x, truth in zip(images, truths, strict=True))
        scale = max(1.0, *(float(truth.abs().max()) for truth in truths))
        if not (math.isfinite(own) and math.isfinite(scale)):
            raise OutputError("the network gives values that are not finite; it is not exported")
        for x, truth in zip(images, truths, strict=True):
            y = run(x)
            if y.shape != truth.shape:
                raise OutputError(f"{who} gives {list(y.shape)} for an image {list(x.shape)}, not {list(truth.shape)}")
            error = float((y.double() - truth).abs().max())
            if not error <= 2 * own + 4 * torch.finfo(torch.float32).eps * scale:
                raise OutputError(
                    f"{who} differs from the reference by {error:.2g} in an image {list(x.shape)}, PyTorch by at most {own:.2g}"
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report on themselves, and on packages that are not needed here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
