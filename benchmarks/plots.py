"""Plots of the stored results as PNG, beside them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memnet_fast.errors import MissingExtra
from memnet_fast.files import write_whole
from memnet_fast.profile import plots as profile_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.report import Results

_OURS, _OTHERS = "tab:red", "tab:gray"


def draw(results: Results) -> None:
    """Every plot for which there is data. Raises MissingExtra without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"plots need matplotlib ({error}); pip install memnet_fast[bench]") from error
    for name, make in _PLOTS.items():
        picture = make(results)
        if picture is not None:
            write_whole(results.folder / f"{name}.png", picture)


def speedup(results: Results) -> bytes | None:
    """How many times as long as the subject everybody takes, one panel for each size."""
    groups = _by(_timed(results), "model", "subject", "isa", "size")
    if not groups:
        return None

    def fill(axes: Axes, rows: list[dict[str, Any]]) -> None:
        rows = sorted(rows, key=lambda r: r["ratio"], reverse=True)
        low = [max(0.0, r["ratio"] - r["ratio_q20"]) for r in rows]
        high = [max(0.0, r["ratio_q80"] - r["ratio"]) for r in rows]
        bars = axes.barh([r["variant"] for r in rows], [r["ratio"] for r in rows], xerr=[low, high], color=_colours(rows))
        axes.bar_label(bars, [f"{r['ratio']:.2f}" for r in rows], padding=6, fontsize=7)
        axes.set_xlabel("time / time of the subject (20 % to 80 %)")
        axes.set_xlim(0, 1.2 * max(r["ratio_q80"] for r in rows))

    return _panels(groups, fill)


def memory(results: Results) -> bytes | None:
    """Peak memory of the whole process, one panel for each size."""
    groups = _by([r for r in results.rows("memory") if r["status"] == "ok"], "model", "subject", "isa", "size")
    if not groups:
        return None

    def fill(axes: Axes, rows: list[dict[str, Any]]) -> None:
        rows = sorted(rows, key=lambda r: r["peak_mib"], reverse=True)
        bars = axes.barh([r["variant"] for r in rows], [r["peak_mib"] for r in rows], color=_colours(rows))
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=7)
        axes.set_xlabel("peak of the process, MiB")
        axes.margins(x=0.15)

    return _panels(groups, fill)


def times(results: Results) -> bytes | None:
    """Time against pixels for one image, of everything that was timed at two sizes at least."""
    from matplotlib.figure import Figure

    rows = [r for r in _timed(results) if r["n"] == 1]
    rows += [r for r in results.rows("pixels") if r["status"] == "ok" and r["n"] == 1]
    lines = {}
    for key, own in _by(rows, "model", "isa", "variant").items():
        points = sorted({r["h"] * r["w"]: r["ms"] for r in own}.items())
        if len(points) > 1:
            lines[key] = points
    if not lines:
        return None
    figure = Figure((8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (_, isa, variant), points in lines.items():
        ours = variant.startswith("memnet_fast")
        label = variant + (", AVX2" if isa == "avx2" else "")
        pixels, ms = zip(*points, strict=True)
        axes.loglog([p / 1e6 for p in pixels], ms, "o-", label=label, linewidth=2.5 if ours else 1, markersize=3)
    axes.set_xlabel("megapixels")
    axes.set_ylabel("ms")
    axes.set_title(results.device())
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)
    return _png(figure)


def roofline(results: Results) -> bytes | None:
    """From the newest stored profile (`memnet profile --json`, profile*.json), as that draws it."""
    # Other files about profiling lie beside them.
    stored = [json.loads(path.read_text()) for path in sorted(results.folder.glob("profile*.json"))]
    profiles = [d for d in stored if d.get("rows") and d.get("ceilings")]
    return profile_plots.roofline(profiles[-1]) if profiles else None


_PLOTS: dict[str, Callable[[Results], bytes | None]] = {
    "speedup": speedup,
    "times": times,
    "memory": memory,
    "roofline": roofline,
}


def _timed(results: Results) -> list[dict[str, Any]]:
    return [r for r in results.rows("forward") if r["status"] == "ok"]


def _by(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def _colours(rows: list[dict[str, Any]]) -> list[str]:
    return [_OURS if r["variant"].startswith("memnet_fast") else _OTHERS for r in rows]


def _panels(groups: dict[tuple[Any, ...], list[dict[str, Any]]], fill: Callable[[Axes, list[dict[str, Any]]], None]) -> bytes:
    from matplotlib.figure import Figure

    heights = [0.6 + 0.22 * len(rows) for rows in groups.values()]
    figure = Figure((8, sum(heights) + 0.5 * len(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((model, subject, isa, size), rows) in zip(panels, groups.items(), strict=True):
        fill(axes, rows)
        axes.set_title(f"{model}, {size}, subject {subject}" + (", AVX-512 left alone" if isa == "avx2" else ""), fontsize=9)
        axes.tick_params(labelsize=7)
    return _png(figure)


def _png(figure: Any) -> bytes:
    """The same data give the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, metadata={"Software": None})
    return out.getvalue()
