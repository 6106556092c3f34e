"""The pictures: roofline and memory. matplotlib is imported here and nowhere else, and never its global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memnet_fast import timing
from memnet_fast.errors import MissingExtra
from memnet_fast.profile.memory import Memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"first_conv": "tab:green", "residual_block": "tab:blue", "gate": "tab:orange", "reconstruct": "tab:red"}


def require() -> None:
    """Raises MissingExtra without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"plots need matplotlib ({error}); pip install memnet_fast[profile]") from error


def roofline(values: dict[str, Any]) -> bytes:
    """A PNG: FLOP per byte against FLOP per second, both axes logarithmic, one point for each row of the table.

    values: those of a profile (table.values), or what was stored of them.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    ceilings = values["ceilings"][-1]
    ridge = ceilings["flops"] / ceilings["bytes"]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in values["rows"]:
        families.setdefault(row["name"].partition(",")[0], []).append(row)
    intensities = [r["executed_gflop"] / r["gb"] for r in values["rows"]]
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    roof = [1e-9 * min(ceilings["flops"], x * ceilings["bytes"]) for x in (low, ridge, high)]
    rate = "multiply-adds" if ceilings["fma"] else "product"
    threads = {None: "", 1: ", 1 thread"}.get(ceilings["threads"], f", {ceilings['threads']} threads")
    label = f"measured: {rate} {1e-9 * ceilings['flops']:.0f} GFLOP/s, copy {1e-9 * ceilings['bytes']:.1f} GB/s{threads}"
    axes.loglog([low, ridge, high], roof, color="black", label=label)
    for kind, rows in families.items():
        for r in rows:
            size, y = 4 + 20 * r["share"] ** 0.5, 1e3 * r["tflops"]
            axes.loglog([r["executed_gflop"] / r["gb"]], [y], "o", color=_COLOURS[kind], markersize=size, alpha=0.7)
        # In the legend: gates, however many sources they have, lie too close together for a name at each point.
        axes.plot([], [], "o", color=_COLOURS[kind], alpha=0.7, label=_family([r["name"] for r in rows]))
    what = f"{values['backend']} {values['precision']} {values['algorithm']}, {'x'.join(map(str, values['shape']))}"
    axes.set_title(f"{what}; area: share of the time")
    axes.set_xlabel("executed FLOP per byte that must move")
    axes.set_ylabel("GFLOP/s, executed")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="best", fontsize=8)
    return _png(figure)


def _family(names: Sequence[str]) -> str:
    """One name for rows of one kind: ("gate, 7 sources", ..., "gate, 12 sources") -> "gate, 7 to 12 sources"."""
    return names[0] if len(names) == 1 else f"{names[0].removesuffix(' sources')} to {names[-1].partition(', ')[2]}"


def memory_chart(memory: Memory) -> bytes:
    """A PNG: lifetimes of the maps in their slots above, bytes alive below, beside the reference."""
    figure = _figure(10, 7)
    above, below = figure.subplots(2, 1)
    for life in memory.lives:
        kind = life.name.partition(".")[0]
        above.barh(life.slot, life.last - life.first + 0.9, left=life.first - 0.45, height=0.8, color=_COLOURS[kind], alpha=0.7)
    for kind in dict.fromkeys(life.name.partition(".")[0] for life in memory.lives):
        above.barh(0, 0, color=_COLOURS[kind], alpha=0.7, label=f"written by {kind}")
    above.set_ylabel("slot")
    above.set_yticks(range(memory.num_slots))
    above.invert_yaxis()
    above.set_xlim(-1, len(memory.steps))
    above.set_xlabel("step: an operation of the plan, or a part of one")
    above.set_title(f"{memory.num_slots} slots of {memory.slot_bytes / 2**20:.1f} MiB: the maps that they hold")
    above.legend(loc="lower left", fontsize=7)
    mib = 2.0**20
    ours = [b / mib for b in memory.live]
    below.step([i / len(ours) for i in range(len(ours))], ours, where="post", label="plan: maps in use")
    below.axhline(memory.workspace / mib, color="tab:blue", linestyle="--", label="plan: workspace, allocated once")
    theirs = [a.live / mib for a in memory.reference]
    places = [i / len(theirs) for i in range(len(theirs))]
    below.step(places, theirs, where="post", color="tab:red", label="reference (float32): tensors alive")
    joined = [i for i, a in enumerate(memory.reference) if a.op == "cat"]
    below.plot([places[i] for i in joined], [theirs[i] for i in joined], "v", color="black", label="a concatenation")
    below.set_xlabel("from the first step (0) to the last (1)")
    below.set_ylabel("MiB")
    below.set_ylim(bottom=0)
    below.grid(True, alpha=0.3)
    below.legend(loc="upper left", fontsize=7)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # the same values give the same bytes
    return buffer.getvalue()


assert set(_COLOURS) == set(timing.KINDS.values())
