"""A page that shows what the splats of a model do; `gsa inspect`.

    report.py        the page and the figures, as files
    measuring.py     all numbers of the page, as arrays
    stages.py        the splats of other checkpoints and of a run's steps
    model_charts.py  charts of a whole model, as Vega-Lite
    head_charts.py   charts of one head
    style.py         the look of both
    packing.py       attention weights and points as the page takes them
    page.py          charts, numbers and text in one file of HTML
    page.html.j2     its template, with its style and its script

May be changed here: this map, and which names are public.
"""

from gsa_jax.inspection.report import inspect

__all__ = ["inspect"]
