"""The page in a real browser, from disk: it draws without errors, and shows what the model computes.

Its numbers are compared with float64 rows of attention; Chromium is driven by Playwright.
"""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import gsa_jax
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.inspection import inspect
from gsa_jax.inspection.measuring import Inspection
from gsa_jax.inspection.page import LARGEST, render
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.attention_oracle import far_keys, head_splats, hf_projections, key_importance, row_weights
from helpers.texts import STORIES

WINDOW, KEPT = 32, 8
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.parity]


class Made(NamedTuple):
    """What `inspect` made of the bundled model and its trained splats."""

    page: Path
    figures: Path
    found: Inspection
    tensors: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    parent = tmp_path_factory.mktemp("page")
    convert(story_neo, parent / "splats", splats=gsa_jax.assets.story_neo_splats())
    config, tensors = load_tensors(parent / "splats")
    earlier = {name: x - 0.2 if name.endswith("splat_centers") else x for name, x in tensors.items()}
    save(parent / "earlier", config, earlier, copied=tokenizer_files(parent / "splats"))
    found = inspect(
        parent / "splats",
        parent / "report.html",
        text=STORIES,
        compare=parent / "earlier",
        figures=parent / "figures",
        window=WINDOW,
        kept=KEPT,
    )
    return Made(parent / "report.html", parent / "figures", found, tensors)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no browser ({', '.join(BROWSERS)}); install one: bash .ci/browser")
    with sync_playwright() as playwright:
        # Without a sandbox of its own, which root cannot have.
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


class Opened(NamedTuple):
    """A page and what it has said and asked for."""

    page: Any
    said: list[str]
    asked: list[str]


def open_page(browser: Any, made: Made, width: int) -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(made.page.as_uri())
    page.wait_for_selector("body[data-ready]", timeout=120_000)
    return Opened(page, said, asked)


@pytest.fixture(scope="module")
def opened(browser: Any, made: Made) -> Opened:
    return open_page(browser, made, 1280)


def test_it_draws_without_a_word_and_asks_for_nothing(opened: Opened, made: Made) -> None:
    assert opened.said == []
    assert opened.asked == [made.page.as_uri()]
    for chart in ("arms", "atlas", "exact", "weights", "difference", "bars", "moves", "masses", "usage", "entropies"):
        box = opened.page.locator(f"#{chart} :is(svg, canvas)").bounding_box()
        assert box["width"] > 150 and box["height"] > 50, chart
    assert made.page.stat().st_size <= LARGEST


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(browser: Any, made: Made, width: int) -> None:
    page = open_page(browser, made, width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in page.locator(".chart").all():
        box = chart.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.close()


def rows_of(page: Any) -> list[list[str]]:
    """All tokens that the chosen one sees: position, token, how it is seen, weight exactly and with splats."""
    return page.evaluate(
        "[...document.querySelectorAll('#all tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )


@pytest.mark.parametrize("query", [0, 20, 70, 100])
def test_a_click_shows_the_sources_of_a_token(opened: Opened, made: Made, story_neo: Path, query: int) -> None:
    """In the first layer, whose queries and keys PyTorch has as well, from the exact model."""
    page, head = opened.page, 1
    page.select_option("#head", label=f"layer 0, head {head}")
    page.locator(f"#text-weights [data-position='{query}']").click()
    page.wait_for_function(
        f"document.getElementById('chosen').textContent.includes('(token {query}, layer 0, head {head})')"
    )
    ids = np.array([made_ids(made)])
    projections = hf_projections(story_neo, ids, 4)[0]
    queries, keys, values = (x[0, : query + 1, head].astype(np.float64) for x in projections)
    splats = head_splats(made.tensors, 0, head)
    far = far_keys(keys, WINDOW, KEPT, key_importance(made.tensors, 0, head, keys, values))
    exact, _ = row_weights(queries[query], keys, far, None, None)
    weights, through = row_weights(queries[query], keys, far, None, splats)

    rows = rows_of(page)
    assert [int(row[0]) for row in rows] == list(range(query + 1))
    shown_exact, shown = (np.array([float(row[column]) for row in rows]) for column in (3, 4))
    np.testing.assert_allclose([shown_exact.sum(), shown.sum()], 1, atol=1e-3)
    for got, expected in ((shown_exact, exact), (shown, weights)):
        np.testing.assert_allclose(got, expected, rtol=5.1e-3, atol=3e-5)
    seen = np.array([row[2] for row in rows])
    np.testing.assert_array_equal(np.char.startswith(seen, "splat"), far)
    np.testing.assert_array_equal(seen == "near", np.arange(query, -1, -1) < WINDOW)

    said = page.locator("#chosen").inner_text().replace("\u00a0", " ")
    masses = [float(x) for x in re.findall(r"(?:near|kept|far) ([\d.]+) %", said)]
    near = np.arange(query, -1, -1) < WINDOW
    expected = [100 * row[part].sum() for row in (weights, exact) for part in (near, ~near & ~far, far)]
    np.testing.assert_allclose(masses, expected, atol=0.06)
    bars = page.locator("#bars path[aria-roledescription='bar']").count() if far.any() else 0
    assert bars == min(10, np.count_nonzero(through > 1 / 65_535))


def made_ids(made: Made) -> list[int]:
    tokenizer = gsa_jax.open_tokenizer(Path(made.found.checkpoint))
    return [0, *tokenizer.encode("".join(made.found.tokens[1:]))]


def test_arrow_keys_choose_tokens_and_buttons_heads(opened: Opened) -> None:
    page = opened.page
    page.locator("#text-weights [data-position='40']").click()
    page.keyboard.press("ArrowRight")
    assert "(token 41," in page.locator("#chosen").inner_text()
    assert page.evaluate("document.activeElement.dataset.position") == "41"
    page.keyboard.press("Home")
    assert "(token 0," in page.locator("#chosen").inner_text()
    assert page.locator("#text-weights [tabindex='0']").count() == 1
    before = page.locator("#head").input_value()
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.getElementById('head').value != {before}")
    assert opened.said == []


def test_a_click_on_a_map_chooses_its_row(opened: Opened) -> None:
    page = opened.page
    page.locator("#text-weights [data-position='0']").click()
    page.locator("#weights").scroll_into_view_if_needed()
    box = page.locator("#weights canvas").bounding_box()
    page.mouse.click(box["x"] + 0.35 * box["width"], box["y"] + 0.45 * box["height"])
    page.wait_for_function("!document.getElementById('chosen').textContent.includes('(token 0,')", timeout=10_000)


def test_a_point_of_the_atlas_shows_its_token_in_its_sentence_and_chooses_it(opened: Opened, made: Made) -> None:
    """The one that lies highest, which no other covers."""
    page = opened.page
    page.select_option("#head", label="layer 0, head 1")
    page.locator("#text-weights [data-position='0']").click()
    page.locator("#atlas").scroll_into_view_if_needed()
    points = page.locator("#atlas path[aria-roledescription='point']")
    tops = points.evaluate_all("points => points.map((point) => point.getBoundingClientRect().y)")
    highest = points.nth(int(np.argmin(tops)))
    highest.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible", timeout=10_000)
    said = page.locator("#vg-tooltip-element").inner_text()
    position = int(re.search(r"position\s+(\d+)", said)[1])
    assert f"[{made.found.tokens[position].strip()}]" in said
    highest.click(force=True)
    page.wait_for_function(f"document.getElementById('chosen').textContent.includes('(token {position},')")
    assert opened.said == []


def test_text_cannot_become_script(made: Made) -> None:
    """Nothing of the data ends a script, and a policy lets the browser load nothing."""
    html = made.page.read_text(encoding="utf-8")
    assert html.count("</script>") == html.count("<script") == 4
    assert "default-src 'none'" in html


def test_figures(made: Made) -> None:
    names = {path.name for path in made.figures.iterdir()}
    heads = [f"layer{layer}-head{head}" for layer in (0, 2) for head in range(4)]
    charts = ["masses", "usage", "entropies", "arms", *(f"text-{n}" for n in range(len(made.found.losses)))]
    charts += [f"{chart}-{head}" for chart in ("atlas", "attention", "moves") for head in heads]
    assert names == {f"{chart}.{kind}" for chart in charts for kind in ("svg", "png")}
    for path in made.figures.iterdir():
        start = path.read_bytes()[:8]
        assert start.startswith(b"<svg") or start == b"\x89PNG\r\n\x1a\n", path


def test_a_model_of_many_heads_stays_small(made: Made) -> None:
    """Layers as if there were twelve of each: some heads of all of them are drawn, which the page says."""
    found, times = made.found, 12
    layers = [(n, head.layer) for n in range(times) for head in found.heads[::4]]

    def repeated(heads: tuple[Any, ...]) -> tuple[Any, ...]:
        of_layer = {layer: [head for head in heads if head.layer == layer] for layer in (0, 2)}
        return tuple(
            dataclasses.replace(head, layer=number)
            for number, (_, layer) in enumerate(layers)
            for head in of_layer[layer]
        )

    diagnostics = dataclasses.replace(found.diagnostics, heads=repeated(found.diagnostics.heads))
    heads = repeated(found.heads)
    html = render(dataclasses.replace(found, heads=heads, all_heads=len(heads), diagnostics=diagnostics))
    drawn = re.findall(r"<option value=.*?>layer (\d+), head \d</option>", html)
    assert LARGEST * 0.8 < len(html.encode()) <= LARGEST
    assert f"{len(drawn)} of {len(heads)} heads" in html
    assert len(set(drawn)) == 2 * times
