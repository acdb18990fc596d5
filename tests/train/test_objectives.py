"""What distillation minimises, against its definition, computed document by document from PyTorch's hidden states.

May be changed here: the objectives' definitions. The oracle is float64, and knows nothing of packed rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from gsa_jax import SplatConfig
from gsa_jax.config import GPTNeoConfig
from gsa_jax.parameters import build_model, expected_shapes, named_parameters
from gsa_jax.train.config import OptimizerConfig
from gsa_jax.train.objectives import output_error, prediction_divergence
from gsa_jax.train.optimizer import make_optimizer
from helpers.attention_oracle import far_keys, head_splats, row_weights
from helpers.hf_oracle import hf_model
from helpers.tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")

KINDS = {"output": output_error, "logits": prediction_divergence}

SHAPE = {"attention_types": [[["local", "global"], 1]], "initializer_range": 0.15}
HF = hf_model(**SHAPE)
EXACT = GPTNeoConfig.from_hf(HF.config)
HEADS, LOCAL = EXACT.num_heads, EXACT.window_size
LENGTHS = [[11, 1, 12], [24], [3, 20, 1]]
"""Of the documents of each row; longer and shorter than any window."""

WINDOW = 4
"""Of the student with splats in all layers; less than the exact model's local layer has."""


def batch(seed: int) -> dict[str, np.ndarray]:
    segments = [np.repeat(np.arange(1, len(row) + 1), row) for row in LENGTHS]
    return {"input_ids": random_ids(seed, len(LENGTHS), sum(LENGTHS[0])), "segment_ids": np.int32(segments)}


def documents(of: dict[str, np.ndarray]):
    """The ids of each document, one after another."""
    for ids, segments in zip(of["input_ids"], of["segment_ids"], strict=True):
        for number in range(1, segments[-1] + 1):
            yield ids[segments == number]


def config_of(window: int, layers: str) -> GPTNeoConfig:
    splats = SplatConfig(num_splats=3, window=window, layers=layers, log_amplitudes=True, norm_gain=True, far_gain=True)
    return dataclasses.replace(EXACT, splats=splats)


@functools.cache
def parameters(layers: str) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The exact model's parameters, and random splats."""
    exact, random = named_parameters(tiny_model(**SHAPE)), np.random.default_rng(3)
    shapes = expected_shapes(config_of(0, layers))
    splats = {
        name: jnp.asarray(random.normal(size=shape, scale=0.1 if "gain" in name else 1.0), jnp.float32)
        for name, shape in shapes.items()
        if name not in exact
    }
    return exact, splats


def build(config: GPTNeoConfig):
    return lambda params: build_model(config, {name: params[name] for name in expected_shapes(config)})


@functools.cache
def measure(kind: str):
    """`call(splats, batch) -> (loss, reported), gradients`, of the student with splats in all layers."""
    exact, _ = parameters("all")
    function = KINDS[kind](build(config_of(WINDOW, "all")), build(EXACT))
    return jax.jit(jax.value_and_grad(lambda splats, batch: function({**exact, **splats}, exact, batch), has_aux=True))


@functools.cache
def hf_attention_inputs(seed: int) -> list[list[np.ndarray]]:
    """What each layer's attention is fed, `[T, E]`, for each document alone."""
    model, found = hf_model(**SHAPE).double(), []
    for block in model.transformer.h:
        block.ln_1.register_forward_hook(lambda module, args, output: found[-1].append(output[0].numpy()))
    for ids in documents(batch(seed)):
        found.append([])
        with torch.no_grad():
            model(torch.from_numpy(ids)[None].long())
    return found


def by_definition(splats: dict[str, np.ndarray], seed: int, window: int, layers: tuple[int, ...]) -> list[float]:
    """What `output_error` says about each of these layers."""
    weights = {name: tensor.double().numpy() for name, tensor in HF.state_dict().items()}
    results = []
    for layer in layers:
        prefix = f"transformer.h.{layer}.attn.attention."
        seen = LOCAL if EXACT.attention_layers[layer] == "local" else None
        wrong = whole = 0.0
        for inputs in hf_attention_inputs(seed):
            query, key, value = (
                (inputs[layer] @ weights[prefix + name].T).reshape(len(inputs[layer]), HEADS, -1).swapaxes(0, 1)
                for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")
            )
            outputs = np.zeros((2, *value.shape))
            for head in range(HEADS):
                of_head = head_splats(splats, layer, head)
                for row in range(value.shape[1]):
                    q, k, v = query[head, row], key[head, : row + 1], value[head, : row + 1]
                    far = far_keys(k, window, kept=0)
                    exact, _ = row_weights(q, k, far, seen, None)
                    found, _ = row_weights(q, k, far, None, of_head)
                    outputs[:, head, row] = exact @ v, found @ v
            exact, found = outputs.swapaxes(1, 2).reshape(2, value.shape[1], -1) @ weights[prefix + "out_proj.weight"].T
            whole += np.sum((exact + weights[prefix + "out_proj.bias"]) ** 2)
            wrong += np.sum((found - exact) ** 2)
        results.append(wrong / whole)
    return results


def test_the_error_of_outputs_and_its_gradient_are_those_of_the_definition():
    """The gradient along a random direction is the definition's difference quotient."""
    _, splats = parameters("all")
    random, step = np.random.default_rng(5), 1e-4
    direction = {name: random.normal(size=tensor.shape) for name, tensor in splats.items()}

    def moved(by: float) -> np.ndarray:
        wide = {name: np.float64(tensor) + by * direction[name] for name, tensor in splats.items()}
        return np.array(by_definition(wide, 1, WINDOW, (0, 1)))

    (loss, found), gradients = measure("output")(splats, batch(1))
    assert list(found) == ["error_0", "error_1"]
    np.testing.assert_allclose(list(found.values()), moved(0), rtol=2e-5)
    np.testing.assert_allclose(loss, moved(0).mean(), rtol=2e-5)
    slope = sum(np.sum(np.float64(gradients[name]) * direction[name]) for name in splats)
    np.testing.assert_allclose(slope, (moved(step) - moved(-step)).mean() / (2 * step), rtol=1e-4)


def test_layers_without_splats_are_passed_through_exactly():
    """Here the local one, with no window at all in the other."""
    exact, splats = parameters("global")
    student = build(config_of(0, "global"))

    loss, found = jax.jit(output_error(student, build(EXACT)))({**exact, **splats}, exact, batch(2))
    assert list(found) == ["error_1"]
    np.testing.assert_allclose([loss, found["error_1"]], by_definition(splats, 2, 0, (1,)) * 2, rtol=2e-5)


def test_a_layers_error_is_that_of_its_own_splats_alone():
    """So that no gradient passes a layer."""
    _, splats = parameters("all")
    (_, before), _ = measure("output")(splats, batch(1))
    for layer in (0, 1):
        moved = {name: tensor + 0.5 * (f".h.{layer}." in name) for name, tensor in splats.items()}
        (_, after), gradients = measure("output")(moved, batch(1))
        assert all(np.any(gradient) for gradient in gradients.values())
        changed = [number for number in (0, 1) if before[f"error_{number}"] != after[f"error_{number}"]]
        assert changed == [layer]


def test_prediction_divergence_is_that_of_pytorch():
    """Students and teachers read each document alone; a document's last token predicts the next one's first."""
    exact, splats = parameters("all")
    student, of = build(config_of(WINDOW, "all")), batch(1)
    ids, lengths = of["input_ids"], [length for row in LENGTHS for length in row]
    padded = np.stack([np.pad(document, (0, ids.shape[1] - len(document))) for document in documents(of)])
    logits = np.array(jax.jit(lambda ids: student({**exact, **splats})(ids))(padded))
    alone = [torch.from_numpy(x[:length]) for x, length in zip(logits, lengths, strict=True)]
    with torch.no_grad():
        exactly = [HF(torch.from_numpy(document)[None].long()).logits[0] for document in documents(of)]
    found, teacher = (
        torch.log_softmax(torch.cat(x).double().reshape(*ids.shape, -1)[:, :-1].flatten(0, 1), -1)
        for x in (alone, exactly)
    )
    divergence = torch.nn.functional.kl_div(found, teacher, reduction="batchmean", log_target=True).item()
    entropy = torch.nn.functional.nll_loss(found, torch.from_numpy(ids[:, 1:].reshape(-1)).long()).item()
    assert divergence > 0.05

    function = jax.jit(
        lambda weight: prediction_divergence(student, build(EXACT), weight)(
            {**exact, **splats}, exact, jax.tree.map(jnp.asarray, of)
        )
    )
    for weight in (1.0, 0.25, 0.0):
        loss, reported = function(weight)
        assert reported.keys() == {"divergence", "cross_entropy"}
        np.testing.assert_allclose(reported["divergence"], divergence, rtol=1e-5)
        np.testing.assert_allclose(reported["cross_entropy"], entropy, rtol=1e-5)
        np.testing.assert_allclose(loss, weight * divergence + (1 - weight) * entropy, rtol=1e-5)


@pytest.mark.slow
def test_thirty_steps_of_distillation_bring_the_model_closer():
    """On rows that were not trained on. Each objective lowers itself, and the divergence of predictions with it."""
    _, splats = parameters("all")
    optimizer = make_optimizer(OptimizerConfig(splat_learning_rate=0.1), 30)
    update = jax.jit(optimizer.update)
    for kind, share in (("output", 0.7), ("logits", 0.9)):
        trained, opt_state = splats, optimizer.init(splats)
        for number in range(30):
            _, gradients = measure(kind)(trained, batch(10 + number))
            updates, opt_state = update(gradients, opt_state, trained)
            trained = optax.apply_updates(trained, updates)
        own, predictions = (
            [float(measure(name)(x, batch(0))[0][0]) for x in (splats, trained)] for name in (kind, "logits")
        )
        assert own[1] < share * own[0]
        assert predictions[1] < 0.9 * predictions[0]
