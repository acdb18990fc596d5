"""Inputs that once led to a traceback, a hang, or a look at files elsewhere; each is refused in one line now.

May be changed here: an input for each fault that fuzzing or reading has found, as small as it can be.
"""

import gzip
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from fuzz.readers import CONFIG, READERS, SPLATS, TEXTS, VOCABULARY, _run_settings

from gsa_jax.checkpoint import OWN_FILES, load, save
from gsa_jax.convert.splat_folder import read_splats
from gsa_jax.errors import InputError
from gsa_jax.publishing import model_card, push_to_hub
from gsa_jax.text_files import TextFiles, read_pieces
from gsa_jax.tokenizer_folder import open_tokenizer
from gsa_jax.train.metrics import read_metrics
from gsa_jax.train.plot import plot_run
from gsa_jax.train.run_folder import open_run

NESTED = '{"item_handlers": ' + "[" * 100_000
"""What a checkpoint of Orbax says of itself."""


def made(reader: str, folder: Path) -> Path:
    """A new folder with a valid input of a reader."""
    folder.mkdir()
    READERS[reader].make(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face folder that converts."""
    return made("safetensors", tmp_path / "source")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"model_type": "gpt_neo", "splats": ' + "[" * 900 + "]" * 900 + "}",
        '{"model_type": "gpt_neo", "vocab_size": ' + "9" * 5000 + "}",
        " " * (2**25 + 1),
    ],
    ids=["deep", "less deep", "digits", "long"],
)
def test_json_that_breaks_its_reader(source, run_gsa, tmp_path, text):
    (source / "config.json").write_text(text)
    run_gsa("convert", source, tmp_path / "out").assert_refused(source / "config.json", "not JSON")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 10**6, "attention_types": [[["global"], 10**6]]}, "more than 512"),
        ({"attention_types": [[[], 10**9], [["global"], 1]]}, "kinds must be names"),
        ({"attention_types": None, "attention_layers": ["global"] * 10**6}, "more than 512"),
        ({"layer_norm_epsilon": 10**400}, "must be finite"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"activation_function": "\x1b[31m" + "x" * 10**5}, r"\x1b[31m"),
    ],
)
def test_configurations_that_claim_too_much(source, run_gsa, tmp_path, changes, words):
    values = CONFIG.to_hf() | changes
    if changes.get("attention_types", 0) is None:
        del values["attention_types"]
    (source / "config.json").write_text(json.dumps(values))
    outcome = run_gsa("convert", source, tmp_path / "out")
    outcome.assert_refused(source / "config.json", words)
    assert outcome.err[:-1].isprintable() and len(outcome.err) < 2000


def test_layers_that_are_claimed_and_not_there(tmp_path):
    """Hundreds of them were traced one by one, which took longer than reading a large model."""
    READERS["gpt2"].make(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"n_layer": 512}))
    started = time.process_time()
    with pytest.raises(InputError, match="tensors do not fit"):
        READERS["gpt2"].call(tmp_path)
    assert time.process_time() - started < 5


def test_shards_of_names_that_no_file_can_have(tmp_path):
    READERS["index"].make(tmp_path)
    for name in ("[" * 1000, "\0"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(InputError, match="shards are missing"):
            READERS["index"].call(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates"])
def test_links_that_lead_out_of_a_folder(source, run_gsa, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    if (source / name).exists():
        (source / name).rename(outside / name)
    (source / name).symlink_to(outside / name if name != "additional_chat_templates" else outside)
    (outside / "secret").write_text("secret")
    run_gsa("convert", source, tmp_path / "out").assert_refused(source / name, "leads out of its folder")


def test_a_link_that_transformers_would_follow_for_a_tokenizer(tmp_path):
    folder = made("old-tokenizer", tmp_path / "source")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(InputError, match="leads out of its folder"):
        open_tokenizer(folder)


def test_links_within_a_folder_and_in_the_cache_of_a_hub(source, run_gsa, tmp_path):
    (source / "model.safetensors").rename(source / "weights.bin")
    (source / "model.safetensors").symlink_to("weights.bin")
    assert run_gsa("convert", source, tmp_path / "one").code == 0
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        blob = tmp_path / "models--a--b" / "blobs" / name
        blob.write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert run_gsa("convert", snapshot, tmp_path / "two").code == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_pipes_in_place_of_files(source, run_gsa, tmp_path, name):
    if name == "model.safetensors.index.json":
        (source / "model.safetensors").unlink()
        READERS["index"].make(source)
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    said = run_gsa("convert", source, tmp_path / "out")
    # A pipe is no file, so an index that is one is not there.
    said.assert_refused(source, "no weights in it" if "index" in name else "neither a file nor a folder")


def test_code_and_files_that_a_tokenizer_names(tmp_path):
    READERS["old-tokenizer"].make(tmp_path)
    (tmp_path / "canary.py").write_text("raise SystemExit")
    config = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["canary.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"custom code|instantiate the backend tokenizer"):  # in 4 and in 5
        open_tokenizer(tmp_path)
    (tmp_path.parent / "secret").write_text("secret")
    for value in (str(tmp_path.parent / "secret"), "../secret", ["../secret"]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_file": value}))
        with pytest.raises(InputError, match="vocab_file names"):
            open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    own = open_tokenizer(tmp_path).get_vocab()
    for value in ("[" * 1000, "a/" + "b" * 1000, "\0"):  # which no file is called
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_file": value}))
        if version("transformers") < "5":
            with pytest.raises(InputError, match="its tokenizer cannot be read"):
                open_tokenizer(tmp_path)
        else:  # which takes the folder's own file then
            assert open_tokenizer(tmp_path).get_vocab() == own


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_a_token_that_takes_longer_to_add_than_a_model_to_load(tmp_path, name):
    READERS["tokenizer"].make(tmp_path)
    values = json.loads((tmp_path / name).read_text()) | {"chat_template": "x" * 100_000}
    (tmp_path / name).write_text(json.dumps(values | {"pad_token": "x" * 100_000}))
    with pytest.raises(InputError, match=rf"{name}: a token of more than 10,000 characters; remove it"):
        open_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(values))
    assert open_tokenizer(tmp_path).encode("the") == [VOCABULARY.index("th"), VOCABULARY.index("e")]


@pytest.mark.parametrize("member", ["shape", "chunks"])
def test_arrays_that_claim_terabytes(tmp_path, member):
    """Of which everything else fits: the embedding of as many tokens as the configuration says, and no bytes of it."""
    import tensorstore

    folder = made("checkpoint", tmp_path / "checkpoint")
    base = {"driver": "file", "path": f"{folder}/weights/state/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = b"transformer.wte.weight/zarr.json"
    described = json.loads(store.read(key).result().value)
    described["chunk_grid"]["configuration"]["chunk_shape"] = [2**30, 4]
    if member == "shape":
        described["shape"] = [2**30, 4]
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 2**30}
        (folder / "config.json").write_text(json.dumps(config))
    store.write(key, json.dumps(described).encode()).result()
    with pytest.raises(InputError, match="damaged checkpoint"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("eval.json", {"gap_closed": {"value": 1.0, "interval": ""}}),
        ("eval.json", {"text": 3}),
        ("fit_init.json", {"text": 3}),
        ("fit_init.json", {"tokens": "x"}),
        ("verify.json", {"comparisons": [3]}),
    ],
)
def test_reports_that_are_none(tmp_path, name, changes):
    folder = made("reports", tmp_path / "checkpoint")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    with pytest.raises(InputError, match=rf"{name}: not a report of gsa"):
        model_card(folder)


def test_a_report_of_numbers_that_are_too_large(tmp_path):
    folder = made("reports", tmp_path / "checkpoint")
    report = json.loads((folder / "verify.json").read_text())
    report["comparisons"][0]["loss"] = 10**400
    (folder / "verify.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="not a report of gsa verify"):
        model_card(folder)


def test_a_checkpoint_that_says_too_deeply_what_it_is(tmp_path):
    folder = made("checkpoint", tmp_path / "checkpoint")
    (folder / "weights" / "_CHECKPOINT_METADATA").write_text(NESTED)
    with pytest.raises(InputError, match="damaged checkpoint"):
        load(folder)


def test_weights_of_whole_numbers(tmp_path):
    from fuzz.readers import weights

    tensors = {name: tensor.astype(np.int32) for name, tensor in weights(CONFIG).items()}
    save(tmp_path / "checkpoint", CONFIG, tensors, copied=())
    with pytest.raises(InputError, match="is int32"):
        load(tmp_path / "checkpoint")


@pytest.mark.parametrize("content", ["[]", "{}", '{"content": 3, "steps": 1}', '{"content": {}, "steps": "x"}'])
def test_runs_that_are_none(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="not the configuration of a run"):
        open_run(_run_settings(tmp_path), SPLATS, {"text": "0", "checkpoint": "1"})


@pytest.mark.parametrize("line", [b"3", b"[" * 10_000, b'{"kind": "train"}', b'{"step": 1}', b"9" * 5000, b"\xff"])
def test_records_that_are_none(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match="remove the"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("loss", ["", ', "loss": "x"', ', "loss": NaN', ', "loss": [1]'])
def test_records_that_cannot_be_drawn(tmp_path, loss):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "kind": "train"{loss}}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: not to be drawn"):
        plot_run(tmp_path)
    assert not (tmp_path / "metrics.svg").exists()


def test_what_a_run_writes_stays_in_it(tmp_path):
    """A link in a stranger's run, by the name of a file that is written there."""
    secret, run = tmp_path / "secret", made("run", tmp_path / "run")
    secret.write_text("secret")
    (run / ".metrics.jsonl.partial").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of its folder"):
        open_run(_run_settings(run), SPLATS, {"text": "0", "checkpoint": "1"})
    (run / "metrics.svg").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of its folder"):
        plot_run(run)
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("name", ["conversion.json", "config.carried.json", "eval.json", "notes.txt"])
def test_links_in_a_checkpoint_that_would_be_copied_or_uploaded(tmp_path, name):
    folder = made("reports", tmp_path / "checkpoint")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("{}")
    if name in OWN_FILES:
        with pytest.raises(InputError, match="leads out of its folder"):
            load(folder)
    with pytest.raises(InputError, match="leads out of its folder"):
        push_to_hub(folder, "owner/name")


@pytest.mark.parametrize("said", ['{"item_handlers": [[]], "metrics": {}}', NESTED], ids=["nothing", "nested"])
def test_a_checkpoint_of_a_run_that_says_nothing_of_itself(tmp_path, said):
    READERS["run"].make(tmp_path)
    (tmp_path / "steps" / "1" / "_CHECKPOINT_METADATA").write_text(said)
    with pytest.raises(InputError, match="one of its _CHECKPOINT_METADATA is damaged"):
        READERS["run"].call(tmp_path)


def test_splats_that_lie_elsewhere(tmp_path):
    folder = made("splats", tmp_path / "splats")
    (folder / "splats.safetensors").rename(tmp_path / "secret")
    (folder / "splats.safetensors").symlink_to("../secret")
    with pytest.raises(InputError, match="leads out of its folder"):
        read_splats(folder, CONFIG)


@pytest.mark.slow
def test_a_document_without_end(tmp_path):
    file = tmp_path / "text.txt.gz"
    file.write_bytes(gzip.compress(b"a" * 2**22, mtime=0) * 20)
    for longest in (None, 100):
        with pytest.raises(InputError, match="a document of more than 67,108,864 characters"):
            list(read_pieces(TextFiles((file,)), longest))
    lines = tmp_path / "text.jsonl.gz"
    lines.write_bytes(gzip.compress(b"[" * 2**22, mtime=0) * 9)
    with pytest.raises(InputError, match="line 1: more than 33,554,432 bytes"):
        list(read_pieces(TextFiles((lines,))))


def test_a_column_of_text_that_is_none(tmp_path):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array([b"whole", b"\x9e"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "text.parquet")
    with pytest.raises(InputError, match=r"text\.parquet: not a Parquet file that can be read \('utf-8'"):
        list(read_pieces(TextFiles((tmp_path / "text.parquet",))))


def test_a_column_that_says_one_text_often_still_gives_each_row(tmp_path):
    """Read as a dictionary, so that rows share a text that they repeat."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": list(TEXTS) * 300}), tmp_path / "text.parquet")
    found = [piece.text for piece in read_pieces(TextFiles((tmp_path / "text.parquet",)))]
    assert found == [text.strip() for text in TEXTS] * 300
