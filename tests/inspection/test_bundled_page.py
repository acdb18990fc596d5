"""The page in docs/ is that of the splats that are bundled now."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import gsa_jax

PAGE = Path(__file__).parents[2] / "docs" / "report.html"
LARGEST = 5_000_000


def test_the_page_in_docs_shows_the_bundled_splats() -> None:
    html = PAGE.read_text(encoding="utf-8")
    assert len(html.encode()) <= LARGEST
    shown = json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', html)[1])["heads"]
    assert [head["name"] for head in shown] == [f"layer {layer}, head {head}" for layer in (0, 2) for head in range(4)]
    splats = load_file(gsa_jax.assets.story_neo_splats() / "splats.safetensors")
    log_scales = [splats[f"transformer.h.{layer}.attn.attention.splat_log_scales"] for layer in (0, 2)]
    sigma = [[splat["sigma"] for splat in head["circles"]] for head in shown]
    np.testing.assert_allclose(sigma, np.exp(np.concatenate(log_scales)), atol=6e-4)
