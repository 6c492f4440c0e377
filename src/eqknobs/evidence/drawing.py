"""Drawing: one look for the figures of every section, and its colours.

Only sections import this: what it draws is no input of any computation.
"""

import html
import io
import re
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Stand-ins that become CSS variables, so that one drawing serves light and dark.
INK, FAINT, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
HUES = {name: f"#0a0c{i:02x}" for i, name in enumerate("blue sky orange green purple yellow grey".split())}
VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", PAPER: "card"} | {v: k for k, v in HUES.items()}
SAE_HUES = ("blue", "purple", "sky", "green")


def style() -> dict[str, Any]:
    """Settings of matplotlib that every figure shares."""
    return {
        "svg.fonttype": "none",
        "font.size": 9.5,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "figure.constrained_layout.use": True,
    }


def svg(figure: plt.Figure, title: str) -> str:
    """An inline SVG with text as text and colours as CSS variables; ids are salted by the title."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.S)
    drawing = re.sub(r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"\1", drawing, count=1)
    drawing = re.sub("#0a0[bc][0-9a-f]{2}", lambda m: f"var(--{VARIABLES[m[0]]})", drawing)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title, quote=True)}" ', 1)


class Look(NamedTuple):
    """How one arm, space or map is drawn, whichever others there are."""

    color: str
    marker: str = "o"


def look(name: str, looks: dict[str, Look]) -> Look:
    """The look of an arm, space or map by its kind ("sae_probe" of "sae_probe:topk"); else a plain one."""
    return looks.get(name.partition(":")[0], Look(FAINT))


def sae_hue(sae: str, saes: list[str]) -> str:
    """The colour of an SAE, by its place among those of the run."""
    return HUES[SAE_HUES[saes.index(sae) % len(SAE_HUES)]]


def figure(title: str, draw: Any, caption: str, height: float = 2.7, width: float = 4.0) -> dict[str, str]:
    """{title, svg, caption} of a figure that `draw(axes)` fills; height, width: inches."""
    with matplotlib.rc_context(style()):
        drawn, axes = plt.subplots(figsize=(width, height))
        draw(axes)
        return {"title": title, "svg": svg(drawn, title), "caption": caption}


def legend(axes: plt.Axes, columns: int = 2) -> None:
    """A legend below the axes."""
    axes.figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK)
