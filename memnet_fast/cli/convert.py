"""`memnet convert`."""

from __future__ import annotations

from pathlib import Path

import click

from memnet_fast.cli.messages import State, say
from memnet_fast.errors import InputError

_ENDINGS = (".safetensors", ".onnx", ".pt2")


@click.command(short_help="Makes a weight file of this package, ONNX or .pt2 out of any known weight file.")
@click.argument("src", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("dst", metavar="DST.{safetensors,onnx,pt2}", type=click.Path(path_type=Path))
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN, infinite and huge weights and negative variances.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def convert(ctx: click.Context, src: Path, dst: Path, allow_nonfinite: bool, verbose: bool) -> int:
    """Makes DST out of SRC: an official .caffemodel, its conversion to MXNet (.params, with the -symbol.json beside it), a
    PyTorch file (.pth, .pt, .pth.tar) or safetensors of a known port, or a file of this package. The content of SRC says what
    it is, not its name.

    \b
    The ending of DST says what is made:
      .safetensors  a weight file of this package
      .onnx         ONNX, any N, H and W, output in [0, 1]; needs memnet_fast[onnx]
      .pt2          a program of torch.export, any N, H and W

    ONNX and .pt2 are compared with the reference before they are written. DST appears whole or not at all; it may be SRC
    itself, which is then replaced in one step.
    """
    ctx.ensure_object(State).verbose = verbose
    if dst.suffix not in _ENDINGS:
        raise InputError(f"the converted file must be called something{' or '.join(_ENDINGS)}, not {dst.name or dst}")
    from memnet_fast import weights

    loaded = weights.load_any(src, allow_nonfinite)
    info = loaded.info or {"converted_from": {"file": src.name, "sha256": loaded.sha256, "recognised": loaded.line}}
    if dst.suffix == ".safetensors":
        weights.save_weights(loaded.net, dst, info)
    else:
        from memnet_fast import export

        write = export.export_onnx if dst.suffix == ".onnx" else export.export_program
        write(loaded.net, dst, info)
    say(f"{src}: {loaded.line}")
    say(f"wrote {dst}")
    return 0
