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

_SEEN = 5e-4
"""Weights below are white, and left out of figures, each of which is an element of an SVG."""

_MOST_BYTES = 256 * 2**20
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
    if figures is not None and figures.absolute() in (out.absolute(), *out.absolute().parents):
        raise InputError(f"{out}: lies in {figures}, which is to be made for the figures; give it another place")
    text = told_stories() if text is None else text
    with new_file(out) as staging, _folder_or_none(figures) as drawn:
        found = measure(folder, text, compare=compare, window=window, kept=kept, progress=progress)
        staging.write_text(render(found), encoding="utf-8")
        if drawn is not None:
            for name, spec in _figures(found):
                _draw(spec, drawn / name)
    return found


def _folder_or_none(folder: Path | None) -> contextlib.AbstractContextManager[Path | None]:
    return contextlib.nullcontext() if folder is None else new_folder(folder, needed_bytes=_MOST_BYTES)


def _figures(found: Inspection) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and specifications of all figures."""
    import altair

    from gsa_jax.inspection import head_charts, model_charts, packing, style

    width = 520
    for name in ("masses", "usage", "entropies"):
        yield name, style.specification(getattr(model_charts, name)(found.diagnostics).properties(width=width))
    yield "arms", style.specification(model_charts.arms(found.evaluation).properties(width=width))
    for number, losses in enumerate(found.losses):
        yield f"text-{number}", style.specification(model_charts.colored_text(losses))
    shares = {(head.layer, head.head): head.shares for head in found.diagnostics.heads}
    maps = altair.hconcat(*(head_charts.heatmap(field, title) for field, title in head_charts.MAPS.items()))
    maps = maps.resolve_scale(color="independent")
    tokens = packing.token_rows(found.tokens)
    for head in found.heads:
        where, frame = f"layer{head.layer}-head{head.head}", packing.frame(head)
        circles = packing.splat_rows(head, shares[head.layer, head.head])
        points = {"points": packing.point_rows(head), "circles": circles, "tokens": tokens}
        yield f"atlas-{where}", style.specification(head_charts.atlas(frame), points)
        pairs = [row for row in packing.pair_rows(head) if max(row["exact"], row["weights"]) >= _SEEN]
        yield f"attention-{where}", style.specification(maps, {"pairs": pairs, "tokens": tokens})
        if len(found.stages) > 1:
            moves = head_charts.moves(len(found.stages) - 1, frame)
            yield f"moves-{where}", style.specification(moves, {"moves": packing.move_rows(head)})


def _draw(spec: dict[str, Any], path: Path) -> None:
    import vl_convert

    from gsa_jax.inspection.page import VEGA_LITE

    svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    path.with_suffix(".png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
