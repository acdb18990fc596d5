"""One optimiser step: what it computes, against PyTorch and NumPy, and which parameters it leaves alone.

May be changed here: the optimiser and how recipes choose what is trained. PyTorch's AdamW, gradient clipping and a
schedule written out as numbers are the oracle.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsa_jax import SplatConfig
from gsa_jax.train import loop
from gsa_jax.train.config import Distill, Finetune, OptimizerConfig, Pretrain, TrainConfig
from gsa_jax.train.optimizer import learning_rate, make_optimizer
from gsa_jax.train.program import StepProgram
from gsa_jax.train.recipes import Start, prepare
from gsa_jax.train.step import State, init_state, make_step
from helpers.tiny_checkpoints import SHAPE, tiny_checkpoint
from helpers.tiny_models import random_ids

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")

ADAM = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=0.5, final_share=0.2)
STEPS = 6
RATES = [0.0, 0.5, 1.0, *(0.2 + 0.8 * (1 + math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 3))]
"""Of `ADAM`, as shares of the highest: two steps of warm-up and four of a cosine that would reach 0.2 after them."""

SPLATS = SplatConfig(num_splats=2, window=4, layers="all", log_amplitudes=True, norm_gain=True, far_gain=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, story_neo) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"), story_neo)


@pytest.fixture(scope="module")
def with_splats(tmp_path_factory, story_neo) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("splats"), story_neo, splats=SPLATS)


def config_for(recipe: type[TrainConfig], checkpoint: Path, **changes) -> TrainConfig:
    settings = {"steps": STEPS, "batch_size": 4, "optimizer": ADAM} | changes
    return recipe(checkpoint=checkpoint, out=Path("unused"), text=Path("unused"), **settings)


def batch(seed: int) -> dict[str, np.ndarray]:
    ids = random_ids(seed, 4, 16)
    return {"input_ids": ids, "segment_ids": np.ones_like(ids)}


def begin(config: TrainConfig) -> tuple[Start, dict[str, jax.Array], dict[str, jax.Array]]:
    """What a run starts from, the parameters that it trains, and the others."""
    start = prepare(config)
    assert start.tensors is not None
    tensors = {name: jnp.asarray(tensor) for name, tensor in start.tensors.items()}
    trained = {name: tensor for name, tensor in tensors.items() if start.is_trained(name)}
    return start, trained, {name: tensor for name, tensor in tensors.items() if name not in trained}


@functools.cache
def run(config: TrainConfig, steps: int) -> tuple[list[State], list[dict[str, jax.Array]]]:
    """The states and metrics of the first steps, each on a batch of its own."""
    start, trained, frozen = begin(config)
    adam, optimizer = config.optimizer, make_optimizer(config.optimizer, config.steps)
    step = jax.jit(make_step(start.objective, optimizer, accumulate=adam.accumulate, ema_decay=adam.ema_decay))
    states, reported = [init_state(trained, optimizer, adam.ema_decay)], []
    for number in range(steps):
        state, metrics = step(states[-1], frozen, {**frozen, **trained}, batch(number))
        states.append(state)
        reported.append(metrics)
    return states, reported


def distance(found, expected) -> float:
    """Norm of the difference of two flat dicts over that of the second."""
    assert found.keys() == expected.keys()
    pairs = [(np.float64(found[name]), np.float64(expected[name])) for name in expected]
    return math.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))


def moves(states: list[State]) -> dict[str, np.ndarray]:
    return {name: np.float64(x) - np.float64(states[0]["params"][name]) for name, x in states[-1]["params"].items()}


@pytest.mark.parity
def test_steps_are_those_of_pytorch(plain):
    """Losses, norms of gradients, the way that parameters go over a warm-up and a cosine, and their moving average."""
    import torch

    from helpers.hf_oracle import hf_model

    config = config_for(Finetune, plain, optimizer=dataclasses.replace(ADAM, ema_decay=0.75))
    states, reported = run(config, STEPS)
    model = hf_model(**SHAPE).double()
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [x for x in parameters.values() if x.ndim > 1], "weight_decay": 0.1},
        {"params": [x for x in parameters.values() if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    before = {name: x.detach().numpy().copy() for name, x in parameters.items()}
    average, clipped = before, []
    for number, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        ids = torch.from_numpy(batch(number)["input_ids"]).long()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5).item()
        optimizer.step()
        clipped.append(norm > 0.5)
        now = {name: x.detach().numpy().copy() for name, x in parameters.items()}
        average = {name: 0.75 * average[name] + 0.25 * x for name, x in now.items()}
        np.testing.assert_allclose(reported[number]["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(reported[number]["gradient_norm"], norm, rtol=1e-4)
    assert any(clipped)
    assert distance(moves(states), {name: x - before[name] for name, x in now.items()}) < 1e-3
    assert (
        distance(
            {name: np.float64(x) - before[name] for name, x in states[-1]["ema"].items()},
            {name: x - before[name] for name, x in average.items()},
        )
        < 1e-3
    )
    assert all(np.array_equal(x, states[0]["params"][name]) for name, x in states[1]["params"].items()), "rate is 0"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", RATES),
        ("linear", [0.0, 0.5, 1.0, 0.8, 0.6, 0.4]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rates(schedule, expected):
    rates = learning_rate(dataclasses.replace(ADAM, schedule=schedule), STEPS, 3.0)
    np.testing.assert_allclose([rates(step) for step in range(STEPS)], 3 * np.array(expected), rtol=1e-5)
    at_once = learning_rate(dataclasses.replace(ADAM, schedule=schedule, warmup_steps=0), STEPS, 3.0)
    np.testing.assert_allclose(at_once(0), 3.0, rtol=1e-6)


def test_accumulation_is_the_whole_batch(plain):
    averaged = dataclasses.replace(ADAM, ema_decay=0.75)
    whole = run(config_for(Finetune, plain, optimizer=averaged), STEPS)
    states, reported = run(config_for(Finetune, plain, optimizer=dataclasses.replace(averaged, accumulate=2)), 3)
    for found, expected in zip(reported, whole[1], strict=False):
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    assert distance(moves(states), moves(whole[0][:4])) < 1e-3


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_share_no_row(parts):
    """With one parameter per row, whose gradient is known: each row counts once, by a fourth."""

    def objective(params, teacher, batch):
        own = params["w"][batch["input_ids"][:, 0]]
        return jnp.mean(own**2), {"mean": jnp.mean(own)}

    optimizer = optax.sgd(1.0)
    step = jax.jit(make_step(objective, optimizer, accumulate=parts, ema_decay=None))
    start = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    rows = {name: np.arange(4, dtype=np.int32)[:, None] for name in ("input_ids", "segment_ids")}
    state, metrics = step(init_state({"w": jnp.asarray(start)}, optimizer, None), {}, {}, rows)
    np.testing.assert_allclose(state["params"]["w"], start - start / 2, rtol=1e-6)
    assert metrics["loss"] == pytest.approx(7.5) and metrics["mean"] == pytest.approx(2.5)
    assert metrics["gradient_norm"] == pytest.approx(np.linalg.norm(start / 2))


@pytest.mark.slow
def test_bfloat16_computes_with_float32_masters(plain):
    config = config_for(Finetune, plain, optimizer=dataclasses.replace(ADAM, ema_decay=0.75))
    states, reported = run(dataclasses.replace(config, dtype="bfloat16"), 2)
    whole = run(config, STEPS)[1]
    for name in ("params", "opt_state", "ema"):
        kinds = {x.dtype for x in jax.tree.leaves(states[-1][name]) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert kinds == {jnp.dtype("float32")}
    for found, expected in zip(reported, whole, strict=False):
        for name, tolerance in (("loss", 0.01), ("gradient_norm", 0.1)):
            assert found[name] != expected[name]
            np.testing.assert_allclose(found[name], expected[name], rtol=tolerance)


@pytest.mark.slow
def test_recomputed_blocks_have_the_same_gradients(plain):
    gradients, computations, rows = [], [], jax.tree.map(jnp.asarray, batch(0))
    for remat in (False, True):
        start, trained, frozen = begin(config_for(Finetune, plain, remat=remat))
        function = jax.grad(lambda params, of=start.objective: of(params, {}, rows)[0])
        assert not frozen
        computations.append(str(jax.make_jaxpr(function)(trained)))
        gradients.append(jax.jit(function)(trained))
    assert distance(gradients[1], gradients[0]) < 1e-5
    assert computations[1].count("tanh") > computations[0].count("tanh")


def test_each_group_has_its_learning_rate(with_splats):
    """Adam's first step moves a parameter by its learning rate, times its gradient's sign, and matrices decay."""
    adam = OptimizerConfig(learning_rate=1e-3, splat_learning_rate=1e-2, weight_decay=0.5, schedule="constant")
    _, params, _ = begin(config_for(Finetune, with_splats))
    optimizer, random = make_optimizer(adam, STEPS), np.random.default_rng(0)
    gradients = {name: jnp.asarray(random.choice([-1.0, 1.0], x.shape)) for name, x in params.items()}
    updates, _ = jax.jit(lambda gradients: optimizer.update(gradients, optimizer.init(params), params))(gradients)
    for name, update in updates.items():
        rate = 1e-2 if ".splat_" in name else 1e-3
        expected = -rate * np.asarray(gradients[name])
        if ".splat_" not in name and update.ndim > 1:
            expected = expected - rate * 0.5 * np.asarray(params[name])
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-4 * rate, err_msg=name)


class NoCheckpoints:
    """Of a run that begins."""

    def restore(self, abstract: object) -> None:
        return None


def first_steps(config: TrainConfig) -> tuple[dict[str, np.ndarray], dict[str, jax.Array], list[dict[str, jax.Array]]]:
    """Two steps as the loop makes them: parameters before and after, and metrics."""
    rows = iter([batch(0), batch(1)])
    run = loop._Run(config, prepare(config), None, rows, 16, NoCheckpoints(), {}, lambda record: None)  # type: ignore
    run.restore_or_begin()
    before, reported = {name: np.array(x) for name, x in run.parameters().items()}, []
    for part in rows:
        old = run.state
        run.state, metrics = run._program.step(old, run._frozen, run._teacher, part)
        assert all(x.is_deleted() for x in jax.tree.leaves(old)), "memory of the old state is not used again"
        reported.append(metrics)
        run.step += 1
    return before, run.parameters(), reported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes", "part"),
    [
        (Distill, {}, ".splat_"),
        (Finetune, {"train": "attention", "teacher_weight": 0.5}, ".attn."),
    ],
)
def test_parameters_that_are_not_trained_keep_every_bit(unchecked, with_splats, recipe, changes, part):
    """The others all move."""
    before, after, reported = first_steps(config_for(recipe, with_splats, optimizer=OptimizerConfig(), **changes))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (np.array(after[name]).tobytes() != tensor.tobytes()) == (part in name), name
    if recipe is Distill:
        assert reported[1]["loss"] == reported[1]["divergence"] > 0


@pytest.mark.parametrize(
    ("train", "parts"),
    [("all", {"attn", "splat", "mlp", "wte"}), ("attention", {"attn", "splat"}), ("splats", {"splat"})],
)
def test_finetuning_trains_what_it_is_told_to(with_splats, train, parts):
    _, trained, frozen = begin(config_for(Finetune, with_splats, train=train))
    examples = {
        "attn": "transformer.h.0.attn.attention.q_proj.weight",
        "splat": "transformer.h.1.attn.attention.splat_far_gain",
        "mlp": "transformer.h.0.mlp.c_fc.bias",
        "wte": "transformer.wte.weight",
    }
    assert {part for part, name in examples.items() if name in trained} == parts
    assert {part for part, name in examples.items() if name in frozen} == examples.keys() - parts


@pytest.mark.slow
def test_the_teacher_of_finetuning_stays_where_it_was(unchecked, plain):
    """A student that begins as its own teacher diverges from it by nothing at first, and by something after a step."""
    adam = OptimizerConfig(learning_rate=1e-2)
    _, _, reported = first_steps(config_for(Finetune, plain, optimizer=adam, teacher_weight=0.5))
    assert abs(reported[0]["divergence"]) < 1e-6 and reported[1]["divergence"] > 0.01


def test_a_step_that_repeats_its_bits_on_a_gpu_does_not_ask_for_cudnn(story_neo, monkeypatch):
    """JAX looks for cuDNN where there is a GPU, as this test says, and does not find it here."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def lower(**settings) -> str:
        paths = {"out": Path("unused"), "text": Path("unused"), "tokenizer": story_neo}
        config = Pretrain(**paths, dtype="bfloat16", context=64, **settings)
        program = StepProgram(config, prepare(config), None, "gpu")
        return program.step.trace(*program.arguments(2, 64)).lower(lowering_platforms=("cuda",)).as_text()

    assert "cudnn" not in lower()
    for settings in ({"deterministic": False}, {"attention_implementation": "cudnn"}):
        with pytest.raises(RuntimeError, match="cuDNN"):
            lower(**settings)
