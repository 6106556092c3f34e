"""Runs a suite and stores what it says:  python -m benchmarks.run [--suite forward] [--sizes 256,512] [--peers fast] ...

    forward   whole networks beside the peers                          --precision fp32|bf16|all  --isa avx2  --threads N
    memory    peak memory of the whole process, without times
    threads   one thread beside all of them                            the subject, and peers where they are named
    pixels    time for one pixel, from the first size to the others    the subject, and peers where they are named
    ops       single operations (pytest-benchmark)

Results go to benchmarks/results/<device>/<suite>-...-<date>.json; nothing is overwritten. The file is there as soon as a row
is done, and holds every row that is: a run that is stopped (exit code 130 or 143) keeps them. `python -m benchmarks.report`
makes the README's tables and the plots from the newest. --seconds is the time for rounds, of all sizes together; starting the
engines and computing the truth (kept in build/benchmarks/) come on top, some ten seconds for each engine and size. Every file
holds the command that made it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commandline, scaling
from benchmarks.device import results_folder
from benchmarks.gpu import store
from benchmarks.networks import network
from memnet_fast.backends import PRECISIONS
from memnet_fast.bench import facts, measure
from memnet_fast.bench.facts import checked_device
from memnet_fast.bench.peers import Variant, own_variants, peer_variants, select
from memnet_fast.bench.sizes import parse_sizes
from memnet_fast.errors import MemNetError
from memnet_fast.files import make_folder, require_writable
from memnet_fast.reference import MemNet

# Files for engines and results in float64: what does not change from run to run, and takes minutes.
_KEPT = Path(__file__).parents[1] / "build" / "benchmarks"
_SUITES = ("forward", "memory", "threads", "pixels", "ops")
_SIZES = {"forward": "256,512,16x64x64", "memory": "256,512", "threads": "256", "pixels": "256,512,1024,2048", "ops": "256"}


def chosen(net: MemNet, device: str, suite: str, precision: str, peers: str | None, backends: str | None) -> list[Variant]:
    """The variants of a run, the subject first: the best backend in the (first) precision. Raises MemNetError."""
    wanted = PRECISIONS if precision == "all" else tuple(precision.split(","))
    own = [v for v in own_variants(net, device) if v.precision in wanted and v.own is not None]
    own.sort(key=lambda v: wanted.index(v.precision))
    others = [v for v in peer_variants(device) if v.precision in wanted]
    if not own:
        raise MemNetError(f"none of this package's backends runs on {device} in {precision}")
    subject = own[0]
    if backends is None:
        # The specification of the numerics is no contender; it is there for who asks.
        own = [v for v in own if v.own and v.own[0] != "torch"] if suite in ("forward", "memory") else own[:1]
    else:
        own = [v for v in own if backends == "all" or (v.own and v.own[0] in backends.split(","))]
    default = "all" if suite in ("forward", "memory") else "none"
    others = select(others, default if peers is None else peers)
    return [subject, *(v for v in own if v != subject), *others]


def _operations(sizes: dict[str, tuple[int, int, int]], threads: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Rows of benchmarks/test_ops.py. Raises MemNetError where a test fails."""
    for _, h, w in sizes.values():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "ops.json"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                str(Path(__file__).with_name("test_ops.py")),
            ]
            command += ["--op-size", f"{h}x{w}", "--op-threads", str(threads), f"--benchmark-json={out}"]
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = commandline.complete(command, Path(__file__).parents[1], env)
            if done.returncode:
                raise MemNetError(f"a single operation is wrong or does not run (pytest ended with {done.returncode})")
            for one in json.loads(out.read_text())["benchmarks"]:
                keep(one["extra_info"])


def _show(row: dict[str, Any]) -> None:
    if "ratio" in row:
        interval = "" if row["ratio_interval"] is None else " ({:.2f} to {:.2f})".format(*row["ratio_interval"])
        end = "" if row["enough"] else ", time spent"
        text = f"{row['ms']:9.1f} ms  ratio {row['ratio']:.3f}{interval}  {row['rounds']} rounds{end}"
    elif "peak_mib" in row:
        text = f"{row['peak_mib']:.0f} MiB"
    else:
        text = f"{row['status']}: {row['reason']}"
    error = row.get("errors", {}).get("nsr")
    nsr = "" if error is None else f"  nsr {error:.1e}"
    others = f"  others {row['others']:.0%}" if row.get("others") else ""
    print(f"{row['size']:10} {row['variant']:40} {text}{nsr}{others}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = commandline.parser("benchmarks.run", __doc__)
    parser.add_argument("--suite", default="forward", choices=_SUITES)
    parser.add_argument("--sizes", help="256, 480x640, 16x64x64, 1080p, 4k, separated by commas")
    parser.add_argument("--model", default="memnet_m6r6.denoise", help="a bundled model, or a preset such as memnet_m10r10")
    parser.add_argument(
        "--precision", default="fp32", help="fp32, bf16 ..., several separated by commas, or all; the first leads"
    )
    parser.add_argument("--peers", help="all, fast, none, or parts of names separated by commas")
    parser.add_argument("--backends", help="all, or names separated by commas")
    parser.add_argument(
        "--isa", default="native", choices=("native", "avx2"), help="avx2: asks everybody to leave AVX-512 alone"
    )
    parser.add_argument("--threads", type=int, help="default: the CPUs of this process")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the rounds of everything")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the results, in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    return commandline.run("benchmarks.run", lambda: _run(options, arguments))


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    sizes, threads = parse_sizes(options.sizes or _SIZES[options.suite]), facts.threads(options.threads)
    command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
    device = checked_device(options.device)
    about = {**facts.about(device), "command": command, "model": options.model, "threads": threads, "device": device}
    del about["package"]  # results are kept; where the package lay says nothing to who reads them
    net = variants = None
    if options.suite != "ops":
        net = network(options.model)
        variants = chosen(net, device, options.suite, options.precision, options.peers, options.backends)
    path = _path(options, None if device == "cpu" else about["gpu"]["name"])
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        store.write(path, {"about": about, "rows": rows})

    def show(row: dict[str, Any]) -> None:
        keep(row)
        _show(row)

    try:
        if net is None or variants is None:
            _operations(sizes, threads, keep)
        else:
            how: dict[str, Any] = {"threads": threads, "device": device, "isa": options.isa, "cache": _KEPT, "tell": _tell}
            with measure.session(net, variants, **how) as session:
                _suite(session, options.suite, sizes, options.seconds, show)
    finally:
        if rows:
            print(f"wrote {path}; again with: {command}", flush=True)
    return 3 if any(row["status"] in ("refused", "failed") for row in rows) else 0


def _suite(
    session: measure.Session,
    suite: str,
    sizes: dict[str, tuple[int, int, int]],
    seconds: float,
    show: Callable[[dict[str, Any]], None],
) -> None:
    if suite == "pixels":
        scaling.pixels(session, sizes, seconds, show)
        return
    for size, shape in sizes.items():
        if suite == "forward":
            measure.forward(session, size, shape, seconds / len(sizes), show)
        elif suite == "memory":
            measure.memory(session, size, shape, show)
        else:
            scaling.threads(session, size, shape, seconds / len(sizes), show)


def _tell(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _path(options: argparse.Namespace, gpu: str | None) -> Path:
    """Where the rows go. Raises OutputError where no file can appear there."""
    label = [options.suite]
    if options.suite != "ops":
        label += [options.model.partition(".")[0], options.precision, options.isa]
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = options.out or results_folder(gpu)
    make_folder(folder)
    path: Path = folder / f"{'-'.join(label).replace(',', '+')}-{date}.json"
    require_writable(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
