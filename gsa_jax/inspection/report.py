"""`inspect`: the page of a checkpoint, and its charts as figures, as files that are whole or absent.

May be changed here: which figures there are, and what is said when the libraries that draw are not installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gsa_jax.assets import told_stories
from gsa_jax.config import Window
from gsa_jax.errors import InputError
from gsa_jax.files import new_file, new_folder, refuse_existing
from gsa_jax.inspection.measuring import Inspection, measure
from gsa_jax.progress import Progress
from gsa_jax.text_files import Text

_MOST_BYTES = 64 * 2**20
"""That figures are expected to take."""


def inspect(
    folder: Path,
    out: Path,
    *,
    text: Text | None = None,
    compare: Path | None = None,
    figures: Path | None = None,
    window: Window | None = None,
    kept: int | None = None,
    progress: Progress = iter,
) -> Inspection:
    """Makes the page of a checkpoint with splats, or of the run that trained them; needs the extra `inspect`.

    Args:
        out: file of HTML to make, of at most `gsa_jax.inspection.page.LARGEST` bytes.
        text: to look at; the stories that come with the package if None.
        compare: checkpoint or run with the same splats at another time, from which their way is drawn.
        figures: folder to make, with each chart as SVG and PNG.
        window: tokens that splat layers see exactly; as the checkpoint says if None.
        kept: keys beyond the window that each of their heads sees exactly; as the checkpoint says if None.
        progress: wraps the names of the batches of text.

    Returns:
        The numbers of the page.

    Raises:
        InputError: `out` or `figures` exists or cannot be written, libraries are missing, or what `measure` refuses.
    """
    try:
        from gsa_jax.inspection.page import render
    except ModuleNotFoundError as error:
        if error.name not in ("altair", "jinja2", "markupsafe", "vl_convert"):
            raise
        raise InputError(f"pages and figures need {error.name}; pip install 'gsa-jax[inspect]'") from None
    for path in (out, figures):
        if path is not None:
            refuse_existing(path)
    text = told_stories() if text is None else text
    with new_file(out) as staging, _folder_or_none(figures) as drawn:
        found = measure(folder, text, compare=compare, window=window, kept=kept, progress=progress)
        staging.write_text(render(found), encoding="utf-8")
        if drawn is not None:
            for name, chart in _figures(found):
                _draw(chart, drawn / name)
    return found


def _folder_or_none(folder: Path | None) -> contextlib.AbstractContextManager[Path | None]:
    return contextlib.nullcontext() if folder is None else new_folder(folder, needed_bytes=_MOST_BYTES)


def _figures(found: Inspection) -> Iterator[tuple[str, Any]]:
    """Names and charts of all figures."""
    import altair

    from gsa_jax.inspection import charts, packing

    shares = {(head.layer, head.head): head.shares for head in found.diagnostics.heads}
    tokens = packing.token_rows(found.tokens)
    for name in ("masses", "usage", "entropies"):
        yield name, getattr(charts, name)(found.diagnostics).properties(width=520)
    yield "arms", charts.arms(found.evaluation).properties(width=520)
    for number, losses in enumerate(found.losses):
        yield f"text-{number}", charts.colored_text(losses)
    for head in found.heads:
        where, frame = f"layer{head.layer}-head{head.head}", packing.frame(head)
        splats = packing.splat_rows(head, shares[head.layer, head.head])
        yield f"atlas-{where}", charts.atlas(packing.point_rows(head), splats, tokens, frame)
        pairs = packing.pair_rows(head)
        fields = {"exact": "exact attention", "weights": "with splats", "difference": "difference"}
        maps = [charts.heatmap(field, title, pairs, tokens) for field, title in fields.items()]
        yield f"attention-{where}", altair.hconcat(*maps).resolve_scale(color="independent")
        if len(found.stages) > 1:
            yield f"moves-{where}", charts.moves(len(found.stages) - 1, packing.move_rows(head), frame)


def _draw(chart: Any, path: Path) -> None:
    import vl_convert

    from gsa_jax.inspection import charts
    from gsa_jax.inspection.page import VEGA_LITE

    spec = charts.styled(chart).to_dict()
    path.with_suffix(".svg").write_text(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE), encoding="utf-8")
    path.with_suffix(".png").write_bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2))
