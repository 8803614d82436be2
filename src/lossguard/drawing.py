"""Figures on disk, drawn without a display."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def save(figure: Figure, folder: Path) -> Path:
    """Leave ``figure.png`` and ``figure.svg`` in a folder, close the figure; returns the PNG."""
    files = [folder / "figure.png", folder / "figure.svg"]
    with plt.rc_context({"axes.formatter.min_exponent": 4}):  # 0.001 to 1000 are plain numbers
        for file in files:
            figure.savefig(file, dpi=150)
    plt.close(figure)
    return files[0]
