"""Figures on disk, drawn without pyplot, whose backend is the user's."""

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from .files import write_whole

FIGURE = "figure.png"
"""What ``save`` leaves in a folder."""


def titled(title: str, note: str | None) -> str:
    """A title, with what a figure must say of its data, if anything."""
    return f"{title} ({note})" if note else title


def log_losses(axes: Axes) -> None:
    """A logarithmic axis for the lines drawn, if they are above 0, or go down to it."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    values = np.concatenate([[], *drawn])
    values = values[np.isfinite(values)]
    if (values > 0).any() and not (values < 0).any():
        axes.set_yscale("log")


def png(figure: Figure) -> bytes:
    """The figure as a PNG; its description is what its axes are over."""
    from ..cli.terminal import shown  # by Rich, which nobody needs to plot decisions

    for text in figure.findobj(Text):  # Matplotlib warns of letters that no font has, unescaped
        if (told := shown(text.get_text())) != text.get_text():
            text.set_text(told)
    drawn = io.BytesIO()
    about = {"Description": ", ".join(filter(None, (axes.get_xlabel() for axes in figure.axes)))}
    with mpl.rc_context({"axes.formatter.min_exponent": 0}):  # all ticks as powers of ten
        figure.savefig(drawn, format="png", dpi=150, metadata=about)
    return drawn.getvalue()


def save(figure: Figure, folder: Path) -> Path:
    """Leave ``figure.png`` in a folder; returns it.

    Raises:
        OSError: if it can't be written; an old one is left.
    """
    file = folder / FIGURE
    write_whole(file, png(figure), "a figure")
    return file
