"""Model cards whose figures are those of the reports, and checkpoints that go to a hub and come back.

May be changed here: what is asked of a card. The oracle of its figures are the reports; the hub is one on this machine,
spoken to by the real client.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gsa_jax import InputError, SplatConfig, model_card
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert.verify import Comparison
from gsa_jax.evaluation.intervals import Estimate
from gsa_jax.evaluation.perplexity import ArmScore, Evaluation
from gsa_jax.fitting.fitted import FitReport
from helpers.bits import assert_same_tensors
from helpers.hub_server import environment, hub_server
from helpers.texts import STORIES
from helpers.tiny_checkpoints import tiny_checkpoint

SPLATS = SplatConfig(num_splats=2, window=8)

PUSH = """
import json, sys
import gsa_jax

said = []
for folder, name, options in json.loads(sys.argv[1]):
    try:
        said.append(gsa_jax.push_to_hub(folder, name, **options))
    except gsa_jax.InputError as error:
        said.append(str(error))
if len(sys.argv) > 2:
    gsa_jax.save_pretrained(gsa_jax.from_pretrained(sys.argv[2]), sys.argv[3])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, story_neo) -> Path:
    """Not to be changed by a test."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), story_neo, splats=SPLATS)


@pytest.fixture
def copy(tmp_path, checkpoint) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "my-story")


def estimate(value: float, spread: float | None = None) -> Estimate:
    return Estimate(value, None if spread is None else (value - spread, value + spread))


ARMS = tuple(
    ArmScore(name, estimate(2.1), estimate(perplexity, 0.25), estimate(1.1), estimate(ratio, 0.002))
    for name, perplexity, ratio in (("exact", 8.25, 1.0), ("hybrid", 8.375, 1.0152), ("window-only", 9.5, 1.1515))
)
EVALUATION = Evaluation(
    checkpoint="/home/me/my-story",
    text="/home/me/valid.txt, /home/me/more.jsonl",
    arms=ARMS,
    buckets=(),
    gap_closed=estimate(0.891, 0.03),
    closed_by_splats=None,
    closed_by_kept=None,
    notes=(),
    documents=1_234,
    tokens=56_789,
    bytes=250_000,
    context=128,
    splats=SPLATS,
    layers=(0,),
    state_bytes=98_765,
)
COMPARISON = Comparison(
    "PyTorch (transformers 4.57.6)", "valid.txt", 4321, 3e-5, 4.56e-7, 0.9987, 2.12345, 2.12346, 1e-4
)
FIT = FitReport("train.txt", 34_567, 7, SPLATS, ())


def write_reports(folder: Path) -> None:
    comparisons = [dataclasses.asdict(COMPARISON) | {"agrees": COMPARISON.agrees}]
    conversion = {"source": "someone/their-model", "hub_id": "someone/their-model"}
    reports: dict[str, Any] = {
        "eval.json": dataclasses.asdict(EVALUATION),
        "verify.json": {"source": "x", "checkpoint": "y", "comparisons": comparisons},
        "fit_init.json": dataclasses.asdict(FIT),
        "conversion.json": conversion,
    }
    for name, report in reports.items():
        (folder / name).write_text(json.dumps(report), encoding="utf-8")


def test_the_figures_of_a_card_are_those_of_the_reports(copy):
    write_reports(copy)
    content = model_card(copy, "me/my-story").content
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in content.splitlines() if line[:1] == "|"]
    for arm in ARMS:
        (row,) = (row for row in rows if row[0] == arm.name)
        for cell, measure in zip(row[1:], (arm.perplexity, arm.perplexity_ratio), strict=True):
            assert [float(number) for number in re.findall(r"[\d.]+", cell)] == pytest.approx(
                [measure.value, *(measure.interval or ())], abs=5e-4
            )
    (row,) = (row for row in rows if row[0] == COMPARISON.oracle)
    assert row[1:] == ["valid.txt", "4,321", "4.6e-07", "1e-04", "99.87%", "2.12345", "2.12346", "agrees"]
    config, tensors = load_tensors(copy)
    for words in (
        "1,234 documents, 56,789 tokens of valid.txt, more.jsonl; context 128.",
        "remember 98,765 bytes",
        "closed: 0.891 [0.861, 0.921]",
        "34,567 tokens of train.txt, seed 7",
        "converted from `someone/their-model`",
        f"{sum(tensor.size for tensor in tensors.values()):,} parameters",
        f"{sum(tensor.size for name, tensor in tensors.items() if '.splat_' in name):,} of these belong to",
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} heads, 1,024 tokens",
        'gsa_jax.from_pretrained("me/my-story")',
        "gsa export checkpoint exported",
        "trust_remote_code=True",
    ):
        assert words in content
    assert "/home/me" not in content and "not been measured" not in content


def test_what_was_not_measured_is_said_with_the_command(copy):
    content = model_card(copy).content
    for words in (
        "has not been measured; `gsa eval CHECKPOINT --text FILE --json CHECKPOINT/eval.json`",
        "has not been measured; `gsa verify SOURCE CHECKPOINT --json CHECKPOINT/verify.json`",
        "no report of `gsa fit-init`",
    ):
        assert words in content
    assert "| hybrid |" not in content and "converted from" not in content


def test_a_card_without_splats_speaks_of_none(tmp_path, story_neo):
    content = model_card(tiny_checkpoint(tmp_path, story_neo)).content
    assert "It has no splats" in content and "trust_remote_code" not in content and "fit-init" not in content


def test_the_hub_reads_the_front_matter(copy, tmp_path):
    write_reports(copy)
    card = model_card(copy)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == {
        "base_model": "someone/their-model",
        "library_name": "gsa-jax",
        "pipeline_tag": "text-generation",
        "tags": ["gsa-jax", "jax", "flax", "gpt_neo", "gaussian-splats"],
    }


@pytest.mark.parity
@pytest.mark.slow
def test_the_commands_write_the_reports_where_a_card_looks_for_them(copy, run_gsa, standard_promotion):
    source = copy.parent / "source"
    assert run_gsa("export", copy, source, "--exact").code == 0
    assert run_gsa("verify", source, copy, "--json", copy / "verify.json").code == 0
    assert run_gsa("eval", copy, "--text", STORIES, "--context", 64, "--json", copy / "eval.json").code == 0
    found = json.loads((copy / "eval.json").read_text())
    content = model_card(copy).content
    assert f"{found['tokens']:,} tokens of stories.txt; context 64" in content
    for arm in found["arms"]:
        assert f"| {arm['name']} | {arm['perplexity']['value']:.3f} [" in content
    compared = json.loads((copy / "verify.json").read_text())["comparisons"]
    assert compared and all(row["agrees"] and f"| {row['oracle']} | random ids |" in content for row in compared)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("eval.json", "{", "cannot be read"),
        ("eval.json", "[]", "not a JSON object"),
        ("eval.json", '{"task": "passkey"}', "not a report of gsa eval"),
        ("eval.json", json.dumps(dataclasses.asdict(EVALUATION) | {"layers": [0, 1]}), "a model with other splats"),
        ("verify.json", '{"comparisons": [{}]}', "not a report of gsa verify"),
        ("fit_init.json", '{"tokens": "many"}', "not a report of gsa fit-init"),
        ("conversion.json", "[]", "not a JSON object"),
    ],
)
def test_a_damaged_report_is_one_line(copy, name, content, words):
    (copy / name).write_text(content)
    with pytest.raises(InputError, match=rf"^[^\n]*{name}: [^\n]*{words}[^\n]*; make it anew, or remove it$"):
        model_card(copy)


def test_what_is_no_checkpoint_has_no_card(tmp_path, story_neo):
    with pytest.raises(InputError, match=r"nowhere: no such checkpoint folder$"):
        model_card(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a gsa-jax checkpoint .*; make one with gsa convert$"):
        model_card(story_neo)


@pytest.mark.slow
def test_to_a_hub_and_back(copy, tmp_path):
    """By the real client; weights that were there before give way, and a card of the user's own is left as it is."""
    write_reports(copy)
    mine = shutil.copytree(copy, tmp_path / "mine")
    (mine / "README.md").write_text("# Mine\n")
    before = {path.relative_to(copy) for path in copy.rglob("*")}
    with hub_server() as hub:
        hub.uploads = tmp_path / "hub"
        other = hub.uploads / "owner" / "other"
        (other / "weights").mkdir(parents=True)
        (other / "weights" / "old").write_text("of another model")
        hub.repositories["owner/other"] = {"main": other}
        pushes = [
            (str(copy), "my-story", {"private": True}),
            (str(mine), "owner/other", {}),
            (str(mine), "not a name", {}),
            (str(mine / "weights"), "owner/third", {}),
        ]
        env = environment(hub, tmp_path / "cache", HF_TOKEN=hub.token)
        command = [sys.executable, "-c", PUSH, json.dumps(pushes), "owner/my-story", tmp_path / "back"]
        said = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
        assert said[:2] == [f"{hub.url}/owner/my-story", f"{hub.url}/owner/other"]
        assert "'not a name': no name of a repository" in said[2] and "not a gsa-jax checkpoint" in said[3]
        assert hub.repositories.keys() == {"owner/my-story", "owner/other"} and hub.private == {"owner/my-story"}
        command = [sys.executable, "-c", PUSH, json.dumps([(str(copy), "owner/fourth", {})])]
        env = environment(hub, tmp_path / "cache", HF_TOKEN="hf_of_someone_else")
        (refused,) = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
        # Versions of the client word it in two ways.
        assert re.match(r"owner/fourth: the hub does not take it \((401 |Client error '401 )", refused)
        assert "hf auth login" in refused
    assert {path.relative_to(copy) for path in copy.rglob("*")} == before
    stored = hub.uploads / "owner" / "my-story"
    assert {path.relative_to(stored) for path in stored.rglob("*")} == before | {Path("README.md")}
    assert str(ModelCard.load(stored / "README.md")) == str(model_card(copy, "owner/my-story"))
    assert (other / "README.md").read_text() == "# Mine\n" and not (other / "weights" / "old").exists()
    assert_same_tensors(load_tensors(tmp_path / "back")[1], load_tensors(copy)[1])
