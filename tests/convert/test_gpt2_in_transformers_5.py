"""What is exported of a GPT-2, in transformers 5: the same numbers, and folders that come back.

May be changed here: which exports. Version 5 is installed beside version 4, and runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gsa_jax import SplatConfig, generate, load
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert, export
from gsa_jax.parameters import named_parameters
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.bits import assert_same_tensors
from helpers.hf_gpt2 import hf_gpt2, with_splats, with_tokenizer
from helpers.tiny_models import random_ids, relative_rms

SPLATS = SplatConfig(num_splats=3, window=5, kept=4, importance="learned", norm_gain=True, far_gain=True, layers=(1,))
MODELS: dict[str, dict[str, Any]] = {
    "heads of 64": {"n_embd": 128, "n_head": 2},
    "scaled by layer": {"n_embd": 96, "n_head": 2, "scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False, "n_inner": 20, "activation_function": "relu"},
}

WITH_TRANSFORMERS_5 = """
import sys
import numpy, torch, transformers
ids, mask, out, *folders = sys.argv[1:]
ids, mask = (torch.from_numpy(numpy.load(file)).long() for file in (ids, mask))
positions = (mask.cumsum(1) - 1).clamp(min=0)
result = {"version": transformers.__version__}
for number, folder in enumerate(folders):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        result[f"logits {number}"] = model(ids, attention_mask=mask, position_ids=positions).logits
        result[f"tokens {number}"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    model.save_pretrained(folder + " again")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    result[f"text {number}"] = tokenizer.decode(tokenizer.encode("Once upon a time"))
numpy.savez(out, **result)
"""


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_5_computes_the_same_and_its_folders_come_back(tmp_path: Path, story_neo: Path) -> None:
    ids, mask = random_ids(1, 2, 30), np.ones((2, 30), bool)
    mask[1, :9] = False
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "mask.npy", mask)
    checkpoints: dict[Path, Path] = {}
    for number, shape in enumerate(MODELS.values()):
        folder = tmp_path / str(number)
        model = with_splats(hf_gpt2(vocab_size=1024, **shape), folder, SPLATS)
        with_tokenizer(folder / "plain", story_neo)
        save(folder / "splats", model.config, named_parameters(model), copied=tokenizer_files(folder / "plain"))
        for name in ("plain", "splats"):
            export(folder / name, folder / f"{name} exported")
            checkpoints[folder / f"{name} exported"] = folder / name
    files = [tmp_path / name for name in ("ids.npy", "mask.npy", "result.npz")]
    environment = {"PYTHONPATH": str(Path(sys.prefix) / "transformers5"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", WITH_TRANSFORMERS_5, *files, *checkpoints],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    result = np.load(tmp_path / "result.npz")
    assert str(result["version"]).startswith("5.")
    prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    for number, (exported, checkpoint) in enumerate(checkpoints.items()):
        model = load(checkpoint)
        assert str(result[f"text {number}"]) == "Once upon a time"
        assert relative_rms(np.asarray(model(ids, mask))[mask], result[f"logits {number}"][mask]) < 1e-5
        got = generate(model, prompts, max_new_tokens=8, eos_token_id=-1)
        np.testing.assert_array_equal(got, result[f"tokens {number}"][:, ids.shape[1] :])
        again = exported.with_name(f"{exported.name} again")
        convert(again, again / "converted")
        config, tensors = load_tensors(again / "converted")
        assert config == model.config
        assert_same_tensors(tensors, named_parameters(model))
