"""A run's figure for a page: a legend that switches lines, and buttons that switch the axis."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from ..records import Record
from .lines import BANDS, LABELS, Over, limits, lines

DASHES = ("solid", "dash", "dashdot", "dot")
# Buttons by name: Plotly's own choice includes one that sends the data away.
CONFIG: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}
AXIS = {
    "type": "log",
    "gridcolor": "#ddd",
    "zeroline": False,
    "automargin": True,
    "exponentformat": "power",
}


def interactive(record: Record) -> str:
    """The figure of ``figures.draw`` as HTML, against price at first, without Plotly itself."""
    _, made, curves = record
    shown = lines(curves, made["seconds"])
    traces: list[go.Scatter] = []
    places: dict[Over, list[list[float]]] = {over: [] for over in LABELS}
    for method, one in shown.items():
        color, own = qualitative.D3[one.color], len(traces)
        about = {"name": method, "legendgroup": method, "mode": "lines", "x": one.at["price"]}
        style = {"color": color, "dash": DASHES[one.dashes]}
        traces.append(go.Scatter(**about, y=one.mean, line=style))
        about |= {"showlegend": False}
        if len(shown) <= BANDS:
            about_band = about | {"hoverinfo": "skip", "line": {"width": 0}}
            band = {"fill": "tonexty", "fillcolor": f"{color}26"}
            traces.append(go.Scatter(**about_band, y=one.low))
            traces.append(go.Scatter(**about_band, y=one.high, **band))
        if one.used is not None:
            traces.append(go.Scatter(**about, y=0.5 + 0.5 * one.used, line=style, yaxis="y2"))
        for over, xs in places.items():
            xs += [[float(f"{x:.6g}") for x in one.at[over]]] * (len(traces) - own)
    figure = go.Figure(traces)
    _lay_out(figure, any(one.used is not None for one in shown.values()), places)
    low, high = limits(shown.values())
    figure.update_layout(yaxis_autorangeoptions={"clipmin": low, "clipmax": high})
    return figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)


def _lay_out(figure: go.Figure, guarded: bool, places: Mapping[Over, list[list[float]]]) -> None:
    """Losses above, whether guards used the learned update below, buttons and legend around."""
    buttons = [
        {
            "label": over,
            "method": "update",
            "args": [
                {"x": places[over]},
                {"xaxis.title.text": _on_two_lines(label), "xaxis.autorange": True},
            ],
        }
        for over, label in LABELS.items()
    ]
    figure.update_layout(
        template="none",
        height=560,
        margin={"l": 60, "r": 10, "t": 40, "b": 45},
        hovermode="closest",
        legend={"orientation": "h", "y": -0.25, "yanchor": "top"},
        modebar={"orientation": "v"},  # beside the buttons it would cover them on a phone
        updatemenus=[
            {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02}
            | {"yanchor": "bottom", "buttons": buttons, "showactive": True}
        ],
        xaxis=AXIS
        | {"title": {"text": _on_two_lines(LABELS["price"])}, "anchor": "y2" if guarded else "y"},
        yaxis=AXIS | {"title": {"text": "Training loss"}, "domain": [0.25 if guarded else 0, 1]},
    )
    if guarded:
        ticks = {"tickvals": [0.5, 1], "ticktext": ["fallback", "learned"], "fixedrange": True}
        figure.update_layout(
            yaxis2={"title": {"text": "Led by"}, "domain": [0, 0.2], "range": [0.45, 1.05]} | ticks
        )


def _on_two_lines(label: str) -> str:
    """As wide as a phone."""
    return label.replace(", ", ",<br>")
