"""Two revisions beside each other:  python -m benchmarks.compare REV [REV2] [--sizes 256,512] [--seconds 60] [--json FILE]

Each revision is checked out into a worktree of its own, built there with its native module, and its best backend is timed in a
process of its own, in turns with the other's. REV2: default HEAD, as it is committed. The gate is that of this revision.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import commandline
from benchmarks.networks import network
from memnet_fast.bench import facts, measure, pairs
from memnet_fast.bench.clocks import quantiles
from memnet_fast.bench.peers import Variant
from memnet_fast.bench.process import Process, VariantFailed
from memnet_fast.bench.sizes import parse_sizes
from memnet_fast.errors import InputError, MemNetError
from memnet_fast.files import require_writable, write_whole

_ROOT = Path(__file__).parents[1]


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True)


def commit(revision: str) -> str:
    """Its full name. Raises InputError."""
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode:
        raise InputError(f"'{revision}' is no revision of this repository")
    return done.stdout.strip()


@contextmanager
def built(name: str, native: bool = True) -> Iterator[Path]:
    """The package of a commit, built, as a folder to import it from; worktree and build vanish afterwards. Raises MemNetError,
    also where the native module was wanted and could not be built.
    """
    with tempfile.TemporaryDirectory(prefix="memnet-compare-") as folder:
        tree, library = Path(folder) / "tree", Path(folder) / "lib"
        done = _git("worktree", "add", "--detach", "--quiet", str(tree), name)
        if done.returncode:
            raise MemNetError(f"cannot check {name[:10]} out: {' '.join(done.stderr.split())}")
        try:
            env = {**os.environ, "MEMNET_NO_CUDA": "1"} | ({} if native else {"MEMNET_NO_NATIVE": "1"})
            env.pop("PYTHONPATH", None)
            command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(Path(folder) / "build")]
            pipe = subprocess.PIPE
            done = commandline.complete([*command, "--build-lib", str(library)], tree, env, stdout=pipe, stderr=pipe)
            if done.returncode:
                raise MemNetError(f"{name[:10]} cannot be built: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            # Without this check an editable install of the environment would lend its own module.
            if native and not list((library / "memnet_fast").glob("_native.*")):
                info = json.loads((library / "memnet_fast" / "_build_info.json").read_text())
                raise MemNetError(f"the native module of {name[:10]} cannot be built: {info.get('reason')}")
            yield library
        finally:
            _git("worktree", "remove", "--force", str(tree))


def compare(
    session: measure.Session,
    packages: Sequence[tuple[str, Path]],
    sizes: dict[str, tuple[int, int, int]],
    seconds: float,
    own: tuple[str, str, str] = ("auto", "fp32", "auto"),
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row for each size, which `keep` gets when it is done. packages: commit and folder of the first and of the second;
    ratio: second / first.
    """
    rows = []
    for size, shape in sizes.items():
        n, h, w = shape
        case = session.case(shape)
        row: dict[str, Any] = {"suite": "compare", "size": size, "n": n, "h": h, "w": w, "threads": session.threads}
        row |= {"first": packages[0][0], "second": packages[1][0]}
        with ExitStack() as stack:
            processes = []
            for name, package in packages:
                session.tell(f"{size}: {name[:10]}")
                settings = {
                    "folder": str(session.folder),
                    "shape": shape,
                    "device": "cpu",
                    "threads": session.threads,
                    "own": own,
                }
                processes.append(stack.enter_context(Process(settings, {}, package)))
                gate = case.gated(processes[-1], Variant(name, own[1], own))
                if gate["status"] != "ok":
                    row |= {**gate, "reason": f"{name[:10]}: {gate['reason']}"}
                    break
                row |= {"status": "ok", f"errors_{len(processes)}": gate["errors"]}
            if row["status"] == "ok":
                try:
                    row |= _timed(processes[0], processes[1], seconds / len(sizes))
                except VariantFailed as failure:
                    row |= {"status": "failed", "reason": str(failure)}
        rows.append(row)
        keep(row)
    return rows


def _timed(first: Process, second: Process, seconds: float) -> dict[str, Any]:
    found, enough = pairs.take_turns(lambda: first.time()["ms"], lambda: second.time()["ms"], seconds)
    row = {"ms_1": quantiles(found.subject)[1], "ms_2": quantiles(found.other)[1], **found.row(), "enough": enough}
    return row | {f"peak_mib_{i}": p.ask("memory")["peak_mib"] for i, p in enumerate((first, second), 1)}


def _show(names: Sequence[str], rows: list[dict[str, Any]]) -> None:
    table = Table("size", f"{names[0]}, ms", f"{names[1]}, ms", "ratio", "within (99.5 %)", "20 % to 80 %", "rounds", "MiB")
    for r in rows:
        if r["status"] != "ok":
            table.add_row(r["size"], f"{r['status']}: {r['reason']}")
            continue
        interval = "-" if r["ratio_interval"] is None else "{:.3f} to {:.3f}".format(*r["ratio_interval"])
        spread = f"{r['ratio_q20']:.3f} to {r['ratio_q80']:.3f}"
        memory = f"{r['peak_mib_1']:.0f}, {r['peak_mib_2']:.0f}"
        times = f"{r['ms_1']:.1f}", f"{r['ms_2']:.1f}", f"{r['ratio']:.3f}"
        table.add_row(r["size"], *times, interval, spread, str(r["rounds"]) + ("" if r["enough"] else "*"), memory)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print(f"ratio: time of {names[1]} / time of {names[0]}, below 1: {names[1]} is faster.")
    if any(r["status"] == "ok" and not r["enough"] for r in rows):
        console.print("*: the time was spent before the ratio was known within 2.5 %.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = commandline.parser("benchmarks.compare", __doc__)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("second", metavar="REV2", nargs="?", default="HEAD")
    parser.add_argument("--sizes", default="256")
    parser.add_argument("--model", default="memnet_m6r6.denoise", help="a bundled model, or a preset such as memnet_m10r10")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, help="default: the CPUs of this process")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of all sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--no-native", action="store_true", help="build without the native module (with --backend torch)")
    options = parser.parse_args(arguments)
    return commandline.run("benchmarks.compare", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    names = [options.revision, options.second]
    commits, sizes, threads = [commit(name) for name in names], parse_sizes(options.sizes), facts.threads(options.threads)
    if options.json:
        require_writable(options.json)
    net = network(options.model)
    about = {**facts.about("cpu"), "model": options.model, "threads": threads, "revisions": commits}
    rows: list[dict[str, Any]] = []

    def tell(text: str) -> None:
        print(f"... {text}", file=sys.stderr, flush=True)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if options.json:  # whoever ends this later keeps the sizes that are done
            write_whole(options.json, (json.dumps({"about": about, "rows": rows}, indent=1) + "\n").encode())

    with ExitStack() as stack:
        packages = []
        for name in commits:
            tell(f"building {name[:10]}")
            packages.append((name, stack.enter_context(built(name, not options.no_native))))
        session = stack.enter_context(measure.session(net, [], threads=threads, tell=tell))
        own = (options.backend, options.precision, "auto")
        compare(session, packages, sizes, options.seconds, own, keep)
    _show(names, rows)
    return 0 if all(r["status"] == "ok" for r in rows) else 3


if __name__ == "__main__":
    sys.exit(main())
