"""`benchmarks/hedgehog_gpt2.py` from end to end, with a small random GPT-2 and a small text.

May be changed here: how small they are.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gsa_jax.tokenizer_folder import open_tokenizer
from helpers.hf_gpt2 import hf_gpt2, with_tokenizer, write_gpt2
from helpers.texts import STORIES, TOLD

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.benchmarks, pytest.mark.usefixtures("optimised")]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hedgehog_gpt2.py"
STEPS = "--steps 2 --batch-size 2 --optimizer.learning-rate 1e-3"


def test_every_stage_has_its_row(tmp_path: Path, story_neo: Path) -> None:
    theirs = hf_gpt2(vocab_size=1024, n_layer=1)
    source = with_tokenizer(write_gpt2(tmp_path / "source", theirs), story_neo)
    out = tmp_path / "out"
    arguments = ["--model", source, "--text", TOLD, "--eval-text", STORIES, "--out", out]
    arguments += ["--hybrid", "--preset hybrid --num-splats 4 --window 8 --kept 4"]
    arguments += ["--pure", "--num-splats 4 --window 0 --kept 0 --importance norm"]
    arguments += ["--distill", STEPS, "--finetune", STEPS]
    ended = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 0, ended
    rows = json.loads((out / "hedgehog_gpt2.json").read_text())["rows"]
    stages = [f"{mode}, {stage}" for mode in ("hybrid", "pure") for stage in ("placed", "distilled", "fine-tuned")]
    assert list(rows) == ["exact", "exact, fine-tuned", *stages]
    for stage in stages:
        assert rows[stage]["ratios"]["hybrid"]["value"] > 0 and stage in ended.stdout
        controls = {"window-only", "without-splats", "without-kept"} if stage.startswith("hybrid") else set()
        assert rows[stage]["ratios"].keys() == {"hybrid", "none", *controls}
        exact = rows["exact, fine-tuned" if stage.endswith("fine-tuned") else "exact"]
        assert rows[stage]["exact_perplexity"] == pytest.approx(exact["exact_perplexity"], rel=1e-6)
    assert "published: Hedgehog, fine-tuned" in ended.stdout

    # The perplexity of the exact model is Hugging Face's: each document by itself, in rows of the whole context.
    tokenizer, total, tokens = open_tokenizer(source), 0.0, 0
    for document in STORIES.read_text(encoding="utf-8").split("<|endoftext|>"):
        ids = [0, *tokenizer(document.strip(), add_special_tokens=False)["input_ids"]]
        for start in range(0, len(ids) - 1, 63):
            row = torch.tensor([ids[start : start + 64]])
            with torch.no_grad():
                total += float(theirs(row, labels=row).loss) * (row.numel() - 1)
            tokens += row.numel() - 1
    assert rows["exact"]["tokens"] == tokens
    assert rows["exact"]["exact_perplexity"] == pytest.approx(float(torch.tensor(total / tokens).exp()), rel=1e-4)
