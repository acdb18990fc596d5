"""A checkpoint in lm-evaluation-harness: the scores of the harness's own PyTorch backend, answer by answer.

May be changed here: tasks, and what is refused. The tasks are local; the harness loads nothing from a network.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import gsa_jax
from gsa_jax import InputError, SplatConfig
from gsa_jax.convert import convert
from gsa_jax.lm_eval import GaussianSplatLM
from gsa_jax.text import read_documents
from helpers.hf_gpt2 import hf_gpt2, with_tokenizer, write_gpt2
from helpers.texts import TOLD
from helpers.tiny_checkpoints import tiny_checkpoint

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "likelihood": """
output_type: loglikelihood
doc_to_text: "{{begin}}"
doc_to_target: " {{rest}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "no-context": """
output_type: loglikelihood
doc_to_text: ""
doc_to_target: "{{rest}}"
metric_list: [{metric: perplexity}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: [".", " the"], max_gen_toks: 40}
metric_list: [{metric: exact_match}]
""",
    "whole-generation": """
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: [], max_gen_toks: 30, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks. Stories of different lengths, one of them longer than the model has positions for."""
    folder = tmp_path_factory.mktemp("tasks")
    stories = read_documents(TOLD)
    texts = [*stories[:5], " ".join(stories[5:11])]
    endings = [" and they were happy.", " dog ran to the tree.", " said: no!"]
    items = [
        {
            "text": text,
            "begin": text[: 5 * number + 100].rsplit(" ", 1)[0] if number < 5 else text[:4000],
            "rest": "Lily had a cat." if number else "One day",
            "choices": [" a", *endings[number % 3 :]],
            "label": 0,
        }
        for number, text in enumerate(texts)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    for name, task in TASKS.items():
        data = {"cache_dir": str(folder / "cache"), "data_files": {"test": str(folder / "items.jsonl")}}
        where = f"task: gsa-{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}"
        (folder / f"{name}.yaml").write_text(where + task, encoding="utf-8")
    return folder


def evaluated(model: Any, tasks: Path, **settings: Any) -> Any:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [f"gsa-{name}" for name in TASKS]
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **settings)


pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries under the harness


@pytest.fixture
def gpt2(tmp_path, story_neo) -> tuple[Path, Path]:
    """A random one, and its checkpoint."""
    theirs = hf_gpt2(vocab_size=1024, n_positions=256)
    source = with_tokenizer(write_gpt2(tmp_path / "source", theirs), story_neo)
    convert(source, tmp_path / "checkpoint")
    return source, tmp_path / "checkpoint"


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("donor", ["GPT-Neo", "GPT-2"])
def test_every_answer_is_that_of_the_harness_with_pytorch(story_neo, story_checkpoint, gpt2, tasks, donor) -> None:
    source, checkpoint = (story_neo, story_checkpoint) if donor == "GPT-Neo" else gpt2
    model = GaussianSplatLM(checkpoint, window="all", batch_size=4)
    settings = {"pretrained": str(source), "dtype": "float32"}
    expected = evaluated("hf", tasks, model_args=settings, device="cpu", batch_size=1)
    found = evaluated(model, tasks)
    answers = 0
    for name in (f"gsa-{name}" for name in TASKS):
        for ours, theirs in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert ours["doc_id"] == theirs["doc_id"]
            for (one,), (other,) in zip(ours["resps"], theirs["resps"], strict=True):
                answers += 1
                if isinstance(other, str):
                    assert one == other and one
                elif isinstance(other, tuple):
                    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-4) and one[1] == other[1]
                else:
                    assert one == pytest.approx(other, rel=1e-5)
        for metric, value in expected["results"][name].items():
            close = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert found["results"][name][metric] == close, metric
    assert answers > 6 * len(TASKS)
    assert len({text for s in found["samples"]["gsa-generation"] for (text,) in s["resps"]}) > 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, story_neo) -> Path:
    splats = SplatConfig(num_splats=3, window=4, kept=2)
    return tiny_checkpoint(tmp_path_factory.mktemp("lm_eval"), story_neo, splats=splats)


@pytest.mark.parametrize("options", [{}, pytest.param({"window": 0, "kept": 0}, marks=pytest.mark.slow)])
def test_splats_are_scored_as_the_model_alone_scores_each_text(tiny: Path, options) -> None:
    """In a batch with others, padded; summed in float64."""
    model, draws = GaussianSplatLM(tiny, batch_size=4, max_length=40, **options), np.random.default_rng(0)
    graphdef, params = nnx.split(gsa_jax.load(tiny, **options))
    forward = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))

    def alone(ids: list[int]) -> np.ndarray:
        """Logits of one text; what is behind it changes nothing."""
        return np.asarray(forward(params, np.array([ids + [5] * (40 - len(ids))])), np.float64)[0, : len(ids)]

    requests = []
    for context, continuation in ((3, 30), (35, 4), (60, 2), (20, 40), (5, 0), (2, 60), (1, 1)):
        ids = draws.integers(1, 1024, context + continuation).tolist()
        requests.append((None, ids[:context], ids[context:]))
    requests.append((None, requests[0][1], [int(alone(requests[0][1])[-1].argmax())]))
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (score, is_greedy) in zip(requests, found, strict=True):
        row = (context + continuation)[-41:]
        count = min(len(continuation), 40)
        logits = alone(row[:-1])
        logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logs -= logits.max(-1, keepdims=True)
        at = range(len(row) - 1 - count, len(row) - 1)
        assert score == pytest.approx(sum(logs[place, row[place + 1]] for place in at), rel=1e-5, abs=1e-5)
        assert is_greedy == all(logits[place].argmax() == row[place + 1] for place in at)
    assert found[-1][1] and not found[0][1]


def request(context: str, **options: Any) -> Instance:
    return Instance("generate_until", {}, (context, options), 0)


@pytest.mark.slow
def test_sampling_is_asked_for_and_batches_do_not_change_greedy_texts(tiny: Path) -> None:
    texts = ["Once", "Once upon a time there was a", "Lily", "", "a b c d e"]
    greedy = [request(text, until=["\n"], max_gen_toks=9) for text in texts]
    alone, together = (GaussianSplatLM(tiny, batch_size=size) for size in (1, 3))
    found = alone.generate_until(greedy, disable_tqdm=True)
    assert together.generate_until(greedy, disable_tqdm=True) == found and len(set(found)) > 1
    for temperature, is_greedy in ((5.0, False), (1e-6, True)):
        options = {"do_sample": True, "temperature": temperature, "top_k": 1000, "until": ["\n"], "max_gen_toks": 9}
        drawn = together.generate_until([request(text, **options) for text in texts], disable_tqdm=True)
        assert (drawn == found) is is_greedy


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": "auto"}, "batch_size = auto: give a number of requests"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_length": 1}, "max_length = 1: must be >= 2 and at most 512"),
        ({"window": "all", "kept": 3}, "kept"),
    ],
)
def test_settings_out_of_range_are_refused(story_checkpoint: Path, settings, words: str) -> None:
    with pytest.raises(InputError, match=words):
        GaussianSplatLM(story_checkpoint, **settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_gen_toks": 512}, "512 tokens to generate leave no room for a context in 512 positions"),
        ({"num_beams": 4}, "a task asks for num_beams in generation"),
        ({"do_sample": True, "temperature": -1.0}, "temperature = -1.0"),
    ],
)
def test_what_cannot_be_generated_is_refused(story_checkpoint: Path, options, words: str) -> None:
    with pytest.raises(InputError, match=words):
        GaussianSplatLM(story_checkpoint).generate_until([request("Once", **options)], disable_tqdm=True)


def test_the_harness_can_find_it_by_name() -> None:
    (found,) = importlib.metadata.entry_points(group="lm_eval.models", name="gsa")
    assert found.load() is GaussianSplatLM


@pytest.mark.slow
def test_the_command(run_gsa, tiny: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    words = ["lm-eval", tiny, "--include-path", tasks, "--tasks"]
    run = run_gsa(*words, "gsa-rolling", "--limit", 2, "--window", 0, "--kept", 0, "--batch-size", 2, "--json", out)
    assert run.code == 0, run
    found = json.loads(out.read_text(encoding="utf-8"))["results"]["gsa-rolling"]
    assert found["sample_len"] == 2 and f"{found['byte_perplexity,none']:.4f}" in run.out
    texts = [json.loads(line)["text"] for line in (tasks / "items.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
    model = GaussianSplatLM(tiny, window=0, kept=0, batch_size=2)
    nats = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts], True)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(-sum(nats) / size / np.log(2), rel=1e-6)
    run_gsa(*words, "gsa-nothing").assert_refused("unknown tasks: gsa-nothing")
    run_gsa(*words, "gsa-rolling", "--limit", 0).assert_refused("limit = 0: must be >= 1")
    missing = ["lm-eval", tiny, "--include-path", tmp_path / "nowhere", "--tasks", "gsa-choice"]
    run_gsa(*missing).assert_refused("nowhere: no such folder")


def test_without_the_harness_the_remedy_is_named(run_gsa, tiny: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    run_gsa("lm-eval", tiny, "--tasks", "x").assert_refused("pip install 'gsa-jax[lm-eval]'")
