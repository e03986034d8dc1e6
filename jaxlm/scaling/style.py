"""How every figure looks: one quiet style, safe for the colour-blind, readable without colour.

Matplotlib is imported when a figure is drawn; figures are made without pyplot, so nothing asks for a display.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.scaling.page import write_bytes

INK, GREY, LIGHT = "#20242c", "#6a7280", "#dfe2e7"
# Okabe and Ito's palette, darkest contrasts first; every series also has a marker and a line of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
SIZES = {"s": 0.92, "D": 0.88, "^": 1.2, "v": 1.2, "P": 1.15, "X": 1.15, "*": 2.2}  # to look equally large
LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
DPI = 200
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "mathtext.fontset": "dejavusans",
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "ytick.minor.width": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.2,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled(draw: Callable) -> Callable:
    """A function that draws, under `STYLE` and nothing of the caller's."""

    @functools.wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return inner


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, Any]:
    """A figure of this size in inches, laid out without overlaps, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.04, hspace=0.04)
    return figure, figure.subplots(rows, columns, **options)


def png(figure: Any) -> bytes:
    """The figure as a PNG whose bytes depend on nothing but the picture."""
    return _rendered(figure, "png", {"Software": None})


@styled
def _rendered(figure: Any, kind: str, metadata: dict) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure, whole or not at all, in the format of the path's suffix: .png, .pdf or .svg."""
    path = Path(path)
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    return write_bytes(path, _rendered(figure, path.suffix[1:], metadata[path.suffix]))


def shades(count: int) -> list[Any]:
    """Colours for an ordered series, dark to light, that keep their order in greyscale."""
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.02, 0.82, max(count, 2))[:count]]


# --- Numbers in words ---


def count_text(x: float, digits: int = 3) -> str:
    """A number of parameters or tokens: 850, 12.3k, 1.31M, 20B.

    >>> [count_text(x) for x in (850, 12_345, 1.31e6, 2e10, 999_900)]
    ['850', '12.3k', '1.31M', '20B', '1M']
    """
    for unit in ("", "k", "M", "B"):
        if abs(x) < 999.5:
            return f"{_plain(x, digits)}{unit}"
        x /= 1000
    return f"{_plain(x, digits)}T"


def _plain(x: float, digits: int) -> str:
    """`digits` significant digits, never an exponent: 1e+03 is 1000."""
    text = f"{x:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def power_text(x: float, digits: int = 2) -> str:
    """A number in mathtext: 3e11 is 3 x 10^11.

    >>> power_text(3e11), power_text(1e12), power_text(2.84)
    ('$3\\\\times10^{11}$', '$10^{12}$', '2.8')
    """
    if x == 0 or 0.01 <= abs(x) < 1000:
        return f"{x:.{digits}g}"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    head = "" if mantissa == "1" else rf"{mantissa}\times"
    return rf"${head}10^{{{int(exponent)}}}$"


def interval_text(value: float, interval: Sequence[float] | None, digits: int = 3) -> str:
    """An estimate with its interval: `0.462 [0.44, 0.49]`."""
    if interval is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


# --- Axes ---


def _log_ticks(low: float, high: float, fewest: int) -> tuple[list[float], list[float]]:
    """Labelled and unlabelled ticks of a logarithmic axis: the roundest of which `fewest` fit."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, round(math.log10(high / low) / 6))

    def inside(steps: Sequence[float], every: int = 1) -> list[float]:
        ticks = [s * 10.0**e for e in exponents if e % every == 0 for s in steps]
        return [t for t in ticks if low <= t <= high]

    choices = (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 6, 8),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5),
    )
    choices += (tuple(np.arange(20, 200) / 20),)
    major = next((found for steps in choices if len(found := inside(steps, every)) >= fewest), inside((1,)))
    minor = inside((1,) if every > 1 else range(1, 10))
    return major, [t for t in minor if not any(math.isclose(t, m) for m in major)]


def log_axis(
    axis: Any,
    which: str,
    low: float,
    high: float,
    label: str,
    text: Callable = count_text,
    *,
    fewest: int = 4,
) -> None:
    """Make the x or y axis logarithmic from low to high, with at least so many ticks, that `text` writes."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}lim")(low, high)
    getattr(axis, f"set_{which}label")(label)
    major, minor = _log_ticks(low, high, fewest)
    one = getattr(axis, f"{which}axis")
    one.set_major_locator(FixedLocator(major))
    one.set_major_formatter(FixedFormatter([text(t) for t in major]))
    one.set_minor_locator(FixedLocator(minor))
    one.set_minor_formatter(NullFormatter())


def flops_axis(
    axis: Any, low: float, high: float, which: str = "x", label: str = "training compute $C$ (FLOPs)"
) -> None:
    """A logarithmic axis of compute."""
    log_axis(axis, which, low, high, label, power_text)


def loss_axis(axis: Any, low: float, high: float, label: str = "loss (nats/token)") -> None:
    """A logarithmic y axis of losses, with plain decimals at round places."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

    axis.set_yscale("log")
    axis.set_ylim(low, high)
    ticks = [t for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    digits = max((len(f"{t:.6g}".partition(".")[2]) for t in ticks), default=0)
    axis.yaxis.set_major_formatter(FixedFormatter([f"{t:.{digits}f}" for t in ticks]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel(label)


def span(*values: Any, pad: float = 0.08) -> tuple[float, float]:
    """The range of positive numbers, a little wider in the logarithm."""
    flat = np.concatenate([np.ravel(np.asarray(v, float)) for v in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    low, high = float(flat.min()), float(flat.max())
    margin = pad * math.log(high / low) if high > low else 0.2
    return low * math.exp(-margin), high * math.exp(margin)


def legend_below(figure: Any, handles: Sequence[Any], most: int = 4) -> None:
    """A legend under all axes, outside the data, in as many columns (up to `most`) as fit."""
    longest = max(len(re.sub(r"\\[a-zA-Z!]+|[${}^_]", "", h.get_label())) for h in handles)
    width = 0.062 * longest + 0.62  # inches: of a character, and of the sample line with its gaps
    columns = max(1, min(most, len(handles), int(figure.get_size_inches()[0] / width)))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def legend_right(figure: Any, handles: Sequence[Any], title: str = "") -> None:
    """A legend at the right of all axes, outside the data."""
    legend = figure.legend(handles=list(handles), loc="outside right upper", title=title or None)
    legend.get_title().set_fontsize(7.5)
    legend._legend_box.align = "left"


def marks(marker: str, size: float = 4.5) -> dict[str, Any]:
    """Options of `plot` for a marker with a white rim, of the same apparent size whatever its form."""
    rim = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    return {"marker": marker, "markersize": size * SIZES.get(marker, 1.0), **rim}


def handle(label: str, **options: Any) -> Any:
    """A legend entry."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **{"color": INK, "linestyle": "none", **options})


def size_bar(figure: Any, axis: Any, sizes: Sequence[float]) -> None:
    """A colour bar that names the sizes of an ordered series of `shades`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(sizes)
    mappable = ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, count), ListedColormap(shades(count)))
    bar = figure.colorbar(mappable, ax=axis, pad=0.02, aspect=30)
    shown = np.unique(np.linspace(0, count - 1, min(count, 9)).round().astype(int))
    bar.set_ticks(shown, labels=[count_text(sizes[i]) for i in shown])
    bar.ax.minorticks_off()
    bar.set_label("parameters $N$")
    bar.outline.set_visible(False)


def data_ends(axis: Any, end: float, high: float) -> None:
    """A mark where the fitted data ends, if the axis goes on."""
    if high > 1.3 * end:
        axis.axvspan(end, high, color=LIGHT, alpha=0.35, zorder=0, linewidth=0)
        axis.text(
            math.sqrt(end * high), 0.02, "extrapolated", transform=axis.get_xaxis_transform(), ha="center",
            va="bottom", fontsize=6.5, color=GREY,
        )  # fmt: skip
