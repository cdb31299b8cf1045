"""The app of ``bokeh-ssh demo``: a curve that Python computes again for every move of a slider."""

import math
import os

from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Range1d
from bokeh.models.widgets import Div, Slider
from bokeh.plotting import curdoc, figure

X = [i / 50 for i in range(501)]
COLOR = "#3b6ea8"


def curve(frequency: float, damping: float) -> list[float]:
    """Compute a damped wave."""
    return [math.exp(-damping * x) * math.sin(frequency * x) for x in X]


frequency = Slider(name="frequency", title="Frequency", start=0.5, end=8, step=0.1, value=2)
damping = Slider(name="damping", title="Damping", start=0, end=1, step=0.02, value=0.2)
source = ColumnDataSource(name="wave", data={"x": X, "y": curve(frequency.value, damping.value)})

plot = figure(
    height=340, sizing_mode="stretch_width", y_range=Range1d(start=-1.1, end=1.1), toolbar_location=None
)
plot.line("x", "y", source=source, line_width=3, color=COLOR)
plot.varea("x", 0, "y", source=source, fill_alpha=0.15, color=COLOR)
plot.outline_line_color = None
plot.grid.grid_line_alpha = 0.4

title = Div(text="<h1 style='margin: 0; font: 600 1.6rem system-ui'>Bokeh through SSH</h1>")
answer = Div(name="answer", text="", styles={"font": "1rem system-ui", "color": "#555"})
answers = 0


def update(attr: str, old: float, new: float) -> None:
    """Answer a moved slider: this runs in the server's Python, at the other end of the tunnel."""
    global answers
    answers += 1
    source.data = {"x": X, "y": curve(frequency.value, damping.value)}
    describe()


def describe() -> None:
    """Say who computed the curve."""
    moves = "Move a slider" if answers == 0 else f"{answers} answer{'s' * (answers != 1)} so far"
    answer.text = f"Computed by Python process {os.getpid()}, reached through an SSH tunnel. {moves}."


for slider in (frequency, damping):
    slider.sizing_mode = "stretch_width"
    slider.bar_color = COLOR
    slider.on_change("value", update)
describe()

curdoc().title = "bokeh_ssh demo"
curdoc().add_root(
    column(
        title,
        answer,
        row(frequency, damping, spacing=30, sizing_mode="stretch_width"),
        plot,
        sizing_mode="stretch_width",
        styles={"max-width": "860px", "margin": "2rem auto", "padding": "0 1rem"},
    )
)
