"""How a run went, as one picture of curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from training.durable import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["curves_picture"]

BLUE, GREY, INK, RED, GREEN = "#2b6cb0", "#c9ced6", "#202124", "#c53030", "#00896a"
DOTS = 40
"""Points up to which each has a dot; of more than that, the line is a running median over a fiftieth."""

NAMES = {
    "collapsed": "collapsed",
    "dimensional_collapse": "dimensional collapse",
    "stuck_at_ln_k": "stuck at ln K",
    "same_images": "same images",
}

Record = Mapping[str, Any]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Panel:
    """What one chart shows."""

    key: str
    title: str
    explained: str
    least: float | None = None
    """Where the axis begins, for quantities with a meaningful zero."""
    percent: bool = False
    smooth: bool = False


PANELS = (
    Panel("loss", "Loss", "as the method defines it", smooth=True),
    Panel("image_to_text", "Captions R@1", "held-out images, their caption first", percent=True),
    Panel("text_to_image", "Images R@1", "held-out captions, their image first", percent=True),
    Panel("knn", "k-NN accuracy", "held-out images, top-1", percent=True),
    Panel("feature_std", "Spread of features", "1 is even over all directions, 0 is collapsed", least=0),
    Panel("feature_rank", "Effective rank", "directions that features use (RankMe)", least=0),
    Panel("lr", "Learning rate", "after scaling with the batch", least=0),
    Panel(
        "images_per_second", "Images per second", "of all processes, measuring included", least=0, smooth=True
    ),
)


def curves_picture(records: Sequence[Record], path: Path) -> None:
    """Draws loss, k-NN, spread, rank, learning rate and speed over epochs as a PNG, with alarms marked.

    Args:
        records: Those of metrics.jsonl. What none of them has gets no chart.
        path: The file, replaced whole.

    Raises:
        EmbedServeError: The file cannot be written.
    """
    # Without pyplot: no window system is asked for, and no figure outlives this function.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {panel.key: _curve(records, panel.key) for panel in PANELS}
    shown = [panel for panel in PANELS if len(curves[panel.key][0])]
    across = min(3, max(len(shown), 1))
    down = max(1, -(-len(shown) // across))
    alarms = _alarms(records)
    figure = Figure((4.4 * across, 2.9 * down + 0.3 * bool(alarms)), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    end = max((float(one["epoch"]) for one in records), default=1.0) or 1.0
    for at, axes in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if at < len(shown):
            _draw(axes, shown[at], curves[shown[at].key], end)
            _mark(axes, alarms, named=at == 0)
        else:
            axes.set_axis_off()
    if not shown:
        figure.text(0.5, 0.5, "nothing was logged yet", ha="center", color=INK)
    if alarms:
        words = [f"{number}  {NAMES[code]}, epoch {epoch:.4g}" for number, code, epoch in alarms]
        figure.supxlabel("Alarms:  " + "   ·   ".join(words), color=RED, fontsize=9.5, x=0.01, ha="left")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    with replacing(path, needed=picture.getbuffer().nbytes) as file:
        file.write(picture.getbuffer())


def _curve(records: Sequence[Record], key: str) -> Curve:
    points = [(one["epoch"], one[key]) for one in records if isinstance(one.get(key), int | float)]
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _alarms(records: Sequence[Record]) -> list[tuple[int, str, float]]:
    """(number, code, epoch) of every alarm that was raised."""
    found = [(code, one["epoch"]) for one in records for code in NAMES if f"alarm_{code}" in one]
    return [(number, code, epoch) for number, (code, epoch) in enumerate(found, start=1)]


def _draw(axes: Axes, panel: Panel, curve: Curve, end: float) -> None:
    epochs, values = curve
    if panel.smooth and len(values) > DOTS:
        axes.plot(epochs, values, color=GREY, linewidth=0.8)
        axes.plot(epochs, _running_median(values), color=BLUE, linewidth=1.8)
    else:
        dots = "o" if len(values) <= DOTS and panel.key != "lr" else ""
        axes.plot(epochs, values, color=BLUE, linewidth=1.8, marker=dots, markersize=3.5, clip_on=False)
    if panel.percent:
        best = int(values.argmax())
        axes.plot(epochs[best], values[best], "o", color=GREEN, markersize=7, zorder=3, clip_on=False)
        words = f"best {values[best]:.1%}, epoch {epochs[best]:.4g}"
        axes.text(1, 1.035, words, transform=axes.transAxes, ha="right", fontsize=9, color=GREEN)
    _dress(axes, panel, end, highest=float(values.max()))


def _dress(axes: Axes, panel: Panel, end: float, *, highest: float) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=18)
    axes.text(0, 1.035, panel.explained, transform=axes.transAxes, fontsize=8.5, color="#6b7280")
    axes.set_xlabel("epoch", fontsize=9, color="#6b7280")
    axes.set_xlim(0, end)
    if panel.least is not None:
        axes.set_ylim(panel.least, max(1.06 * highest, 1e-9))
    if panel.percent:
        from matplotlib.ticker import PercentFormatter

        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high - low > 0.08 else 1))
    elif panel.key == "images_per_second":
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors="#4b5563", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def _mark(axes: Axes, alarms: Sequence[tuple[int, str, float]], *, named: bool) -> None:
    for number, _, epoch in alarms:
        axes.axvline(epoch, color=RED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        if named:
            axes.annotate(
                str(number), (epoch, 1), (0, -6), xycoords=("data", "axes fraction"),
                textcoords="offset points", annotation_clip=False,
                ha="center", va="center", fontsize=8, color="white",
                bbox={"boxstyle": "circle,pad=0.25", "facecolor": RED, "edgecolor": "none"},
            )  # fmt: skip


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    half = max(1, len(values) // 100)
    padded = np.pad(values, half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return np.asarray(np.median(windows, axis=1))
