"""A model with splats as a Hugging Face folder: `transformers` computes through them, or refuses to load it.

May be changed here: what `transformers` is asked to do with it. That its code is right: test_pytorch_model.py.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPTNeoForCausalLM, pipeline

from gsa_jax import SplatConfig, generate, load
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert, export
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.bits import assert_same_tensors
from helpers.hf_oracle import torch_logits
from helpers.tiny_checkpoints import tiny_checkpoint
from helpers.tiny_models import relative_rms

pytestmark = pytest.mark.parity

SPLATS = SplatConfig(
    num_splats=(2, 3),
    window=(0, 6),
    kept=(2, 0),
    layers="all",
    log_amplitudes=True,
    norm_gain=True,
    far_gain=True,
    importance="learned",
)

WITH_TRANSFORMERS_5 = """
import sys
import numpy, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoForCausalLM
ids, mask, out, folder, again = sys.argv[1:]
ids, mask = (torch.from_numpy(numpy.load(file)).long() for file in (ids, mask))
for refused in (AutoModelForCausalLM, GPTNeoForCausalLM):
    try:
        refused.from_pretrained(folder)
    except (ValueError, NotImplementedError):
        continue
    raise AssertionError(f"{refused} computes without the splats")
result = {"version": transformers.__version__}
for name in (folder, again):
    model, info = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        result["again" if name == again else "logits"] = model(ids, attention_mask=mask, position_ids=positions).logits
        result["tokens"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    if name == folder:
        model.save_pretrained(again)
loss = model.train()(ids, attention_mask=mask, labels=ids).loss
loss.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
narrow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
for name, tensor in narrow.state_dict().items():
    assert tensor.dtype == (torch.float32 if ".splat_" in name else torch.bfloat16), name
tokenizer = AutoTokenizer.from_pretrained(folder)
result["text"] = tokenizer.decode(tokenizer.encode("Once upon a time"))
numpy.savez(out, **result)
"""


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code of models before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, story_neo: Path) -> Path:
    """Of two layers that differ, with random numbers in every parameter of the splats."""
    folder = tmp_path_factory.mktemp("model")
    wide = tiny_checkpoint(folder, story_neo, splats=SPLATS)
    config, tensors = load_tensors(wide)
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if ".splat_" in name:
            tensors[name] = (tensor + 0.2 * random.normal(size=tensor.shape)).astype(np.float32)
    save(folder / "random", config, tensors, copied=tokenizer_files(wide))
    return folder / "random"


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    export(checkpoint, checkpoint.parent / "exported")
    return checkpoint.parent / "exported"


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, padded on the left."""
    ids = np.random.default_rng(0).integers(1, 1024, (2, 30), dtype=np.int32)
    return ids, np.arange(30) >= np.array([0, 7])[:, None]


@pytest.fixture(scope="module")
def logits(checkpoint: Path, batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.array(nnx.jit(lambda model: model(*batch))(load(checkpoint)))


def auto(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def test_the_folder_holds_the_same_tensors_and_their_code(run_gsa, tmp_path, checkpoint):
    outcome = run_gsa("export", checkpoint, tmp_path / "out")
    assert outcome.code == 0
    assert "model with splats" in outcome.out and "trust_remote_code=True" in outcome.out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "configuration_gsa.py", "modeling_gsa.py"}
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), load_tensors(checkpoint)[1])


@pytest.mark.parametrize(
    ("load_it", "error"),
    [
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False), ValueError),
        (GPTNeoForCausalLM.from_pretrained, NotImplementedError),
        (transformers.GPTNeoModel.from_pretrained, NotImplementedError),
    ],
    ids=["no trust", "GPT-Neo", "GPT-Neo without a head"],
)
def test_without_its_code_it_does_not_load(exported, load_it, error):
    with pytest.raises(error, match=r"trust_remote_code=True|splats"):
        load_it(exported)


def test_logits_are_ours(exported, batch, logits):
    ids, mask = batch
    theirs = auto(exported)
    assert relative_rms(torch_logits(theirs, ids, mask)[mask], logits[mask]) < 1e-5
    base = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    hidden = base(torch.from_numpy(ids[:1]).long()).last_hidden_state
    assert relative_rms(theirs.lm_head(hidden).detach(), logits[:1]) < 1e-5
    # The splats matter: it is not the exact model.
    exact = exported.parent / "exact"
    export(exported.parent / "random", exact, exact=True)
    assert (
        relative_rms(torch_logits(GPTNeoForCausalLM.from_pretrained(exact).eval(), ids, mask)[mask], logits[mask]) > 0.1
    )


def test_the_pipeline_writes_our_text(exported, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = "Once upon a time"
    run = pipeline("text-generation", model=str(exported), trust_remote_code=True)
    got = run(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    want = generate(load(checkpoint), [tokenizer.encode(prompt)], max_new_tokens=12)[0]
    assert got == tokenizer.decode(want, skip_special_tokens=True)


def test_saved_by_transformers_it_loads_again_and_converts_back(tmp_path, exported, checkpoint, batch):
    theirs = auto(exported)
    theirs.save_pretrained(tmp_path / "saved")
    with pytest.raises(NotImplementedError, match="splats"):
        GPTNeoForCausalLM.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(torch_logits(auto(tmp_path / "saved"), *batch), torch_logits(theirs, *batch))
    for folder in (exported, tmp_path / "saved"):
        report = convert(folder, tmp_path / f"{folder.name} converted")
        assert report.splats == "imported"
        config, tensors = load_tensors(tmp_path / f"{folder.name} converted")
        expected_config, expected = load_tensors(checkpoint)
        assert config == expected_config
        assert_same_tensors(tensors, expected)


def test_in_bfloat16_splats_stay_float32(exported, batch, logits):
    theirs = auto(exported, dtype=torch.bfloat16)
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".splat_" in name else torch.bfloat16), name
    assert relative_rms(torch_logits(theirs, *batch)[batch[1]], logits[batch[1]]) < 0.05


def test_training_reaches_every_parameter(exported, batch):
    """With blocks computed anew in the backward pass or not."""
    ids, mask = (torch.from_numpy(np.array(x)).long() for x in batch)
    gradients = []
    for checkpointing in (False, True):
        theirs = auto(exported).train()
        if checkpointing:
            theirs.gradient_checkpointing_enable({"use_reentrant": False})
        theirs(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: x.grad for name, x in theirs.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_tokenizer_needs_no_name_of_its_class(tmp_path, exported, story_neo):
    folder = shutil.copytree(exported, tmp_path / "nameless")
    (folder / "tokenizer_config.json").unlink()
    text = "The dragon and the baker\nlived in a tree."
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert theirs.encode(text) == AutoTokenizer.from_pretrained(story_neo).encode(text)


def test_verify_compares_through_the_splats(run_gsa, tmp_path, exported, checkpoint):
    outcome = run_gsa("verify", exported, checkpoint)
    assert outcome.code == 0 and outcome.out.count("agrees") == 1
    config, tensors = load_tensors(checkpoint)
    save(tmp_path / "other", config.with_window(3), tensors, copied=[])
    run_gsa("verify", exported, tmp_path / "other").assert_refused("has another configuration")


@pytest.mark.slow
def test_verify_finds_another_splat(run_gsa, tmp_path, exported, checkpoint):
    config, tensors = load_tensors(checkpoint)
    name = "transformer.h.0.attn.attention.splat_far_gain"
    save(tmp_path / "other", config, tensors | {name: tensors[name] + 1}, copied=[])
    outcome = run_gsa("verify", exported, tmp_path / "other")
    assert outcome.code == 1 and outcome.out.count("DIFFERS") == 1


def test_exact_and_alone_are_two_exports(run_gsa, tmp_path, checkpoint):
    run_gsa("export", checkpoint, tmp_path / "out", "--exact", "--splats-only").assert_refused("two exports")


@pytest.mark.slow
def test_transformers_5_does_the_same(tmp_path, exported, checkpoint, batch, logits):
    ids, mask = batch
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "mask.npy", mask)
    paths = [tmp_path / name for name in ("ids.npy", "mask.npy", "result.npz")]
    environment = {"PYTHONPATH": str(Path(sys.prefix) / "transformers5"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", WITH_TRANSFORMERS_5, *paths, exported, tmp_path / "again"],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    result = np.load(tmp_path / "result.npz")
    assert str(result["version"]).startswith("5.")
    assert str(result["text"]) == "Once upon a time"
    assert relative_rms(result["logits"][mask], logits[mask]) < 1e-5
    np.testing.assert_array_equal(result["again"], result["logits"])
    prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    want = generate(load(checkpoint), prompts, max_new_tokens=8, eos_token_id=-1)
    np.testing.assert_array_equal(result["tokens"][:, ids.shape[1] :], want)
    config, tensors = load_tensors(checkpoint)
    convert(tmp_path / "again", tmp_path / "converted")
    assert load_tensors(tmp_path / "converted")[0] == config
    assert_same_tensors(load_tensors(tmp_path / "converted")[1], tensors)
