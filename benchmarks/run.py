"""Runs a suite and stores what it says:  python -m benchmarks.run [--suite forward] [--sizes 256,512] [--peers fast] ...

    forward   whole networks beside the peers                          --precision fp32|bf16|all  --isa avx2  --threads N
    memory    peak memory of the whole process, without times
    threads   one thread beside all of them                            the subject, and peers where they are named
    pixels    time for one pixel, from the first size to the others    the subject, and peers where they are named
    ops       single operations (pytest-benchmark)

Results go to benchmarks/results/<device>/<suite>-...-<date>.json; nothing is overwritten. `python -m benchmarks.report` makes
the README's tables and the plots from the newest. --seconds is the time for rounds, of all sizes together; starting the engines
and computing the truth (kept in build/benchmarks/) come on top, some ten seconds for each engine and size. Every file holds the
command that made it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.device import results_folder
from benchmarks.gpu import store
from benchmarks.networks import network
from memnet_fast.backends import PRECISIONS
from memnet_fast.bench import facts, measure
from memnet_fast.bench.peers import Variant, own_variants, peer_variants, select
from memnet_fast.bench.sizes import parse_sizes
from memnet_fast.errors import MemNetError
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


def _operations(sizes: dict[str, tuple[int, int, int]], threads: int) -> list[dict[str, Any]]:
    """Rows of benchmarks/test_ops.py. Raises MemNetError where a test fails."""
    rows = []
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
            code = subprocess.run(command, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            if code.returncode:
                raise MemNetError(f"a single operation is wrong or does not run (pytest ended with {code.returncode})")
            rows += [b["extra_info"] for b in json.loads(out.read_text())["benchmarks"]]
    return rows


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--threads", type=int, default=facts.cpu()["cpus"])
    parser.add_argument("--seconds", type=float, default=300.0, help="for the rounds of everything")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the results, in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    try:
        return _run(options, arguments)
    except MemNetError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    sizes = parse_sizes(options.sizes or _SIZES[options.suite])
    command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
    about = {**facts.about(), "command": command, "model": options.model, "threads": options.threads, "device": options.device}
    del about["package"]  # results are kept; where the package lay says nothing to who reads them
    if options.suite == "ops":
        rows = _operations(sizes, options.threads)
    else:
        net = network(options.model)
        variants = chosen(net, options.device, options.suite, options.precision, options.peers, options.backends)
        rows = []
        how: dict[str, Any] = {"threads": options.threads, "device": options.device, "isa": options.isa, "cache": _KEPT}
        with measure.session(
            net, variants, tell=lambda text: print(f"... {text}", file=sys.stderr, flush=True), **how
        ) as session:
            if options.suite == "pixels":
                rows += scaling.pixels(session, sizes, options.seconds, _show)
            for size, shape in sizes.items() if options.suite != "pixels" else ():
                seconds = options.seconds / len(sizes)
                if options.suite == "forward":
                    rows += measure.forward(session, size, shape, seconds, _show)
                elif options.suite == "memory":
                    rows += measure.memory(session, size, shape, _show)
                else:
                    rows += scaling.threads(session, size, shape, seconds, _show)
    folder = options.out or results_folder(None if options.device == "cpu" else about["gpu"]["name"])
    label = [
        options.suite,
        *([] if options.suite == "ops" else [options.model.partition(".")[0], options.precision, options.isa]),
    ]
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = folder / f"{'-'.join(label).replace(',', '+')}-{date}.json"
    store.write(path, {"about": about, "rows": rows})
    print(f"wrote {path}; again with: {command}")
    return 3 if any(row["status"] in ("refused", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
