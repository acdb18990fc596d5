"""`gsa eval`: the arms are the models they are said to be, by PyTorch's word where it has them."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from gsa_jax import InputError, SplatConfig, load, load_tokenizer
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.evaluation.arms import ARMS, make_arms
from gsa_jax.evaluation.perplexity import Evaluation, evaluate
from gsa_jax.fitting.fitted import fit_init
from gsa_jax.parameters import build_model, expected_shapes
from gsa_jax.splat_config import OPTIONAL_TERMS
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.texts import STORIES
from helpers.tiny_checkpoints import SHAPE, tiny_folder

WINDOW, KEPT, CONTEXT = 8, 4, 100
"""As many tokens as the tiny model's local layer sees; keys kept beyond them; less than the stories have."""


@pytest.fixture(scope="module")
def checkpoint(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a global and a local layer, with splats in the global one that its keys can reach."""
    folder = tmp_path_factory.mktemp("evaluation")
    source = tiny_folder(folder / "source", story_neo)
    convert(source, folder / "checkpoint", splats=SplatConfig(num_splats=3, window=WINDOW, kept=KEPT))

    def widen(tensors: dict[str, np.ndarray]) -> None:
        tensors["transformer.h.0.attn.attention.splat_log_scales"] += 1.0

    return altered(folder / "checkpoint", folder / "widened", widen)


def altered(checkpoint: Path, out: Path, change) -> Path:
    """A copy with other tensors."""
    config, tensors = load_tensors(checkpoint)
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    change(tensors)
    save(out, config, tensors, copied=tokenizer_files(checkpoint))
    return out


@pytest.fixture(scope="module")
def evaluation(checkpoint: Path) -> Evaluation:
    return evaluate(checkpoint, STORIES, context=CONTEXT)


@functools.cache
def torch_model(arm: str) -> Any:
    """The arms that PyTorch has: the model itself, all of its layers local, values of the global layer nothing."""
    import torch

    from helpers.hf_oracle import hf_model

    pattern = "local" if arm == "window-only" else "global"
    model = hf_model(**SHAPE, attention_types=[[[pattern, "local"], 1]], window_size=WINDOW)
    if arm == "none":
        attention = model.transformer.h[0].attn.attention
        attention.v_proj.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    return model


def losses(run, checkpoint: Path) -> np.ndarray:
    """`[nats, position]` of each token of the stories; `run` gives the logits of one window of ids."""
    import torch

    tokenizer = load_tokenizer(checkpoint)
    found = []
    for story in STORIES.read_text(encoding="utf-8").split("<|endoftext|>"):
        tokens = [0, *tokenizer.encode(story.strip(), add_special_tokens=False)]
        for start in range(0, len(tokens) - 1, CONTEXT - 1):
            ids = torch.tensor([tokens[start : start + CONTEXT]])
            logits = torch.from_numpy(run(ids))[0, :-1].double()
            nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            found += zip(nats.tolist(), range(1, len(nats) + 1), strict=True)
    return np.array(found)


def scores(evaluation: Evaluation) -> dict[str, float]:
    return {arm.name: arm.cross_entropy.value for arm in evaluation.arms}


@pytest.mark.parity
@pytest.mark.parametrize("arm", ["exact", "window-only", "none"])
def test_arms_that_pytorch_has_cost_what_pytorch_says(arm: str, checkpoint: Path, evaluation: Evaluation) -> None:
    import torch

    with torch.no_grad():
        expected = losses(lambda ids: torch_model(arm)(ids).logits.numpy(), checkpoint)
    assert evaluation.tokens == len(expected)
    assert scores(evaluation)[arm] == pytest.approx(expected[:, 0].mean(), abs=1e-5)
    for bucket, (first, last) in zip(evaluation.buckets, [(1, 63), (64, CONTEXT - 1)], strict=True):
        inside = expected[(expected[:, 1] >= first) & (expected[:, 1] <= last), 0]
        assert (bucket.first, bucket.last, bucket.tokens) == (first, last, len(inside))
        assert bucket.cross_entropy[arm].value == pytest.approx(inside.mean(), abs=1e-5)


@pytest.mark.parity  # losses are PyTorch's
@pytest.mark.parametrize(("arm", "kept"), [("hybrid", None), ("without-kept", 0)])
def test_arms_with_splats_are_the_loaded_model(
    arm: str, kept: int | None, checkpoint: Path, evaluation: Evaluation
) -> None:
    """One window at a time; padding comes from other tokens and is not said to be padding."""

    graphdef, params = nnx.split(load(checkpoint, kept=kept))
    forward = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))

    def run(ids: Any) -> np.ndarray:
        padded = np.pad(ids.numpy(), ((0, 0), (0, CONTEXT - ids.shape[1])), constant_values=5)
        return np.array(forward(params, padded)[:, : ids.shape[1]])

    assert scores(evaluation)[arm] == pytest.approx(losses(run, checkpoint)[:, 0].mean(), abs=1e-5)
    assert len({round(score, 3) for score in scores(evaluation).values()}) == len(ARMS), "the arms can be told apart"


def test_totals_are_those_of_the_buckets(evaluation: Evaluation) -> None:
    stories = [part.strip() for part in STORIES.read_text(encoding="utf-8").split("<|endoftext|>")]
    stories = [story for story in stories if story]
    assert evaluation.documents == len(stories) == 3
    assert evaluation.bytes == sum(len(story.encode()) for story in stories)
    assert (evaluation.context, evaluation.splats.num_splats, evaluation.layers) == (CONTEXT, 3, (0,))
    assert (evaluation.splats.window, evaluation.splats.kept) == (WINDOW, KEPT)
    assert tuple(scores(evaluation)) == ARMS and evaluation.notes == ()
    assert sum(bucket.tokens for bucket in evaluation.buckets) == evaluation.tokens
    exact = evaluation.arms[0].cross_entropy.value
    for arm in evaluation.arms:
        nats = sum(bucket.tokens * bucket.cross_entropy[arm.name].value for bucket in evaluation.buckets)
        assert nats / evaluation.tokens == pytest.approx(arm.cross_entropy.value, rel=1e-9)
        assert arm.perplexity.value == pytest.approx(math.exp(arm.cross_entropy.value))
        assert arm.perplexity_ratio.value == pytest.approx(math.exp(arm.cross_entropy.value - exact))
        assert arm.perplexity_ratio.interval is not None


def test_a_window_that_holds_the_context_is_exact_bit_for_bit(checkpoint: Path) -> None:
    wide = evaluate(checkpoint, STORIES, window=CONTEXT, context=CONTEXT)
    found = scores(wide)
    assert found["hybrid"] == found["window-only"] == found["exact"]
    assert wide.gap_closed is None


@pytest.mark.slow
def test_arms_that_there_are_not_are_left_out(checkpoint: Path, evaluation: Evaluation) -> None:
    pure = evaluate(checkpoint, STORIES, window=0, context=CONTEXT)
    assert tuple(scores(pure)) == ("exact", "hybrid", "without-splats", "without-kept", "none")
    assert {arm: scores(pure)[arm] for arm in ("exact", "none")} == {
        arm: scores(evaluation)[arm] for arm in ("exact", "none")
    }
    assert pure.gap_closed is None and pure.splats.window == 0
    assert len(pure.notes) == 1 and "window-only is left out" in pure.notes[0]


@pytest.mark.slow
def test_without_kept_keys_there_are_no_arms_about_them(checkpoint: Path, evaluation: Evaluation) -> None:
    plain = evaluate(checkpoint, STORIES, kept=0, context=CONTEXT)
    assert tuple(scores(plain)) == ("exact", "hybrid", "window-only", "none")
    assert scores(plain)["hybrid"] == scores(evaluation)["without-kept"]
    assert len(plain.notes) == 1 and "no keys are kept" in plain.notes[0]
    assert plain.state_bytes < evaluation.state_bytes


@pytest.mark.slow
def test_a_model_that_keeps_keys_and_has_no_splats(checkpoint: Path, evaluation: Evaluation, tmp_path: Path) -> None:
    fit_init(
        checkpoint, tmp_path / "kept", STORIES, splats=SplatConfig(num_splats=0, window=8, kept=4, importance="learned")
    )
    kept = evaluate(tmp_path / "kept", STORIES, context=CONTEXT)
    assert tuple(scores(kept)) == ("exact", "hybrid", "window-only", "none")
    assert len(kept.notes) == 1 and "there are no splats" in kept.notes[0]
    assert scores(kept)["window-only"] == scores(evaluation)["window-only"] != scores(kept)["hybrid"]

    by_norm = SplatConfig(num_splats=0, window=WINDOW, kept=KEPT)
    fit_init(checkpoint, tmp_path / "by norm", STORIES, splats=by_norm)
    found = evaluate(tmp_path / "by norm", STORIES, context=CONTEXT)
    assert scores(found)["hybrid"] == scores(evaluation)["without-splats"]
    with pytest.raises(InputError, match="num_splats = 0 and kept = 0 leave nothing to fit"):
        fit_init(checkpoint, tmp_path / "nothing", STORIES, splats=dataclasses.replace(by_norm, kept=0))


def test_what_each_part_does_given_the_other(evaluation: Evaluation) -> None:
    found = scores(evaluation)
    shares = {
        "window-only": evaluation.gap_closed,
        "without-splats": evaluation.closed_by_splats,
        "without-kept": evaluation.closed_by_kept,
    }
    for arm, share in shares.items():
        gap = found[arm] - found["exact"]
        if gap <= 0:
            assert share is None
        else:
            assert share is not None and share.value == pytest.approx((found[arm] - found["hybrid"]) / gap)


@pytest.mark.parity  # losses are PyTorch's
def test_bits_per_byte_of_one_document(checkpoint: Path, tmp_path: Path) -> None:
    """Bytes are not characters; one document has no interval."""
    import torch

    text = "A café is a small place. Tom's café is blue and white."
    path = tmp_path / "one.txt"
    path.write_text(text + "\n", encoding="utf-8")
    ids = torch.tensor([[0, *load_tokenizer(checkpoint).encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        log_probabilities = torch_model("exact")(ids).logits.double().log_softmax(-1)
    bits = -log_probabilities[0, :-1].gather(1, ids[0, 1:, None]).sum().item() / math.log(2)
    one = evaluate(checkpoint, path, context=CONTEXT)
    assert one.bytes == len(text) + 2
    assert one.arms[0].bits_per_byte.value == pytest.approx(bits / (len(text) + 2), rel=1e-5)
    assert {estimate.interval for arm in one.arms for estimate in (arm.perplexity, arm.bits_per_byte)} == {None}


def test_every_arm_is_a_whole_model_whatever_terms_the_splats_have(checkpoint: Path) -> None:
    config, tensors = load_tensors(checkpoint)
    terms = dict.fromkeys(OPTIONAL_TERMS, True)
    splats = SplatConfig(num_splats=3, window=WINDOW, kept=(0, 2), layers="all", importance="learned", **terms)
    config = dataclasses.replace(config, splats=splats)
    tensors = {name: tensors.get(name, np.ones(shape, np.float32)) for name, shape in expected_shapes(config).items()}
    arms = make_arms(config, tensors)
    assert tuple(arms) == ARMS
    for of_arm, of_tensors in arms.values():
        build_model(of_arm, of_tensors)
    assert arms["exact"][0].windows == ("all", 8) and arms["window-only"][0].windows == (WINDOW, WINDOW)
    assert [name for name in arms["without-splats"][1] if ".splat_" in name] == [
        f"transformer.h.{layer}.attn.attention.splat_importance" for layer in (0, 1)
    ], "the same keys are kept"
    emptied = [name for name, tensor in arms["none"][1].items() if not tensor.any() and tensors[name].any()]
    assert emptied == [f"transformer.h.{layer}.attn.attention.v_proj.weight" for layer in (0, 1)]
    assert all(tensors[name].any() for name in emptied), "the checkpoint's own tensors are left as they are"


def test_what_cannot_be_evaluated_is_refused(checkpoint: Path, story_checkpoint: Path, tmp_path: Path) -> None:
    config, tensors = load_tensors(checkpoint)
    plain = {name: tensor for name, tensor in tensors.items() if ".splat_" not in name}
    for splats in (None, SplatConfig(num_splats=0, window=WINDOW)):
        with pytest.raises(InputError, match="no splats to evaluate; attach and fit them first: gsa fit-init"):
            make_arms(dataclasses.replace(config, splats=splats), plain)
    with pytest.raises(InputError, match="window of all tokens the splats are unused; give a number of tokens: --win"):
        evaluate(story_checkpoint, STORIES)
    with pytest.raises(InputError, match="window = -1: must be a whole number >= 0"):
        evaluate(checkpoint, STORIES, window=-1)
    with pytest.raises(InputError, match="max_documents = 0: must be >= 1"):
        evaluate(checkpoint, STORIES, max_documents=0)
    with pytest.raises(InputError, match="batch_size = 0: must be >= 1"):
        evaluate(checkpoint, STORIES, batch_size=0)

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["transformer.h.0.attn.attention.splat_centers"][0, 0, 0] = np.nan

    spoilt = altered(checkpoint, tmp_path / "spoilt", spoil)
    with pytest.raises(InputError, match="the hybrid model's losses are not finite"):
        evaluate(spoilt, STORIES, context=CONTEXT)


def test_progress_counts_every_batch(checkpoint: Path) -> None:
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    evaluate(checkpoint, STORIES, context=CONTEXT, progress=progress)
    assert len(seen) == len(set(seen)) and {name.split(",")[0] for name in seen} == set(ARMS)


def test_the_command_prints_and_writes_what_the_library_finds(
    run_gsa, checkpoint: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "scores.json"
    outcome = run_gsa("eval", checkpoint, "--text", STORIES, "--context", CONTEXT, "--json", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(dataclasses.asdict(evaluation)))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    for arm in evaluation.arms:
        row = next(line for line in outcome.out.splitlines() if line.startswith(f"│ {arm.name} "))
        assert f"{arm.cross_entropy.value:.4f}" in row and f"{arm.perplexity.value:.3f} [" in row
        assert f"{arm.bits_per_byte.value:.4f}" in row and f"{arm.perplexity_ratio.value:.4f} [" in row
    assert "1-63" in outcome.out and "64-99" in outcome.out
    assert f"3 documents, {evaluation.tokens} tokens, {evaluation.bytes:,} bytes; context 100" in outcome.out
    assert evaluation.gap_closed is None or f"{evaluation.gap_closed.value:.3f} [" in outcome.out


def test_the_command_says_which_arms_are_left_out(run_gsa, checkpoint: Path) -> None:
    outcome = run_gsa("eval", checkpoint, "--text", STORIES, "--window", 0, "--context", CONTEXT, "--max-documents", 1)
    assert outcome.code == 0 and "window-only is left out" in outcome.out
    assert "1 documents" not in outcome.out and "1 document, " in outcome.out


def test_the_command_leaves_nothing_behind(run_gsa, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    run_gsa("eval", checkpoint, "--text", tmp_path / "missing.txt", "--json", out).assert_refused("missing.txt")
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine", encoding="utf-8")
    run_gsa("eval", checkpoint, "--text", tmp_path / "missing.txt", "--json", out).assert_refused(out, "exists already")
    assert out.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parity
def test_without_splats_the_exact_model_is_measured_alone(run_gsa, story_neo: Path, tmp_path: Path) -> None:
    """By PyTorch's word."""
    import torch

    convert(tiny_folder(tmp_path / "source", story_neo), tmp_path / "plain")
    found = evaluate(tmp_path / "plain", STORIES, context=CONTEXT)
    (arm,) = found.arms
    assert arm.name == "exact" and arm.perplexity_ratio.value == 1
    assert (found.splats, found.layers, found.state_bytes, found.gap_closed) == (None, (), 0, None)
    with torch.no_grad():
        expected = losses(lambda ids: torch_model("exact")(ids).logits.numpy(), tmp_path / "plain")
    assert found.tokens == len(expected) and arm.cross_entropy.value == pytest.approx(expected[:, 0].mean(), abs=1e-5)
    outcome = run_gsa("eval", tmp_path / "plain", "--text", STORIES, "--context", CONTEXT)
    assert outcome.code == 0 and "plain: without splats" in " ".join(outcome.out.split())
    assert f"{arm.perplexity.value:.3f} [" in outcome.out and "splat layers remember" not in outcome.out
    asked = ("eval", tmp_path / "plain", "--text", STORIES)
    run_gsa(*asked, "--task", "passkey").assert_refused("has no splats to ask")
    run_gsa(*asked, "--window", 8).assert_refused("window = 8: the model has no splats")
    run_gsa(*asked, "--reference", tmp_path / "plain").assert_refused("no splats to evaluate")


@pytest.mark.parametrize("task", ["perplexity", "passkey"])
def test_a_window_of_all_tokens_leaves_nothing_to_compare(run_gsa, checkpoint: Path, task: str) -> None:
    outcome = run_gsa("eval", checkpoint, "--text", STORIES, "--window", "all", "--task", task)
    outcome.assert_refused("window of all tokens", "--window W")
