"""`memnet convert`."""

from __future__ import annotations

from pathlib import Path

import click

from memnet_fast.cli.messages import say
from memnet_fast.errors import InputError


@click.command(short_help="Makes a weight file of this package out of one of another program.")
@click.argument("src", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("dst", metavar="DST.safetensors", type=click.Path(path_type=Path))
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN, infinite and huge weights and negative variances.")
def convert(src: Path, dst: Path, allow_nonfinite: bool) -> int:
    """Makes a weight file of this package, DST, out of SRC: an official .caffemodel, a PyTorch file (.pth, .pt, .pth.tar) or
    safetensors of a known port, or a file of this package. The content of SRC says what it is, not its name.

    DST appears whole or not at all; it may be SRC itself, which is then replaced in one step.
    """
    if dst.suffix != ".safetensors":
        raise InputError(f"the converted file must be called something.safetensors, not {dst.name or dst}")
    from memnet_fast import weights

    loaded = weights.load_any(src, allow_nonfinite)
    origin = {"file": src.name, "sha256": loaded.sha256, "recognised": loaded.line}
    weights.save_weights(loaded.net, dst, loaded.info or {"converted_from": origin})
    say(f"{src}: {loaded.line}")
    say(f"wrote {dst}")
    return 0
