"""`gsa generate`: what it prints, where its prompts come from, and ends that are no errors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gsa_jax import complete, load, make_sampler, open_tokenizer

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def expected(story_checkpoint: Path) -> dict[str, Any]:
    tokenizer = open_tokenizer(story_checkpoint)
    (found,) = complete(load(story_checkpoint), PROMPT, tokenizer=tokenizer, max_new_tokens=12, logprobs=True)
    return {"prompt": found.prompt, "text": found.text, "tokens": list(found.tokens), "logprobs": list(found.logprobs)}


def pairs(options: dict[str, object]) -> list[object]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_text_is_printed_behind_its_prompt(run_gsa, story_checkpoint, expected):
    for stream in ([], ["--stream"]):
        outcome = run_gsa("generate", story_checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, *stream)
        assert (outcome.code, outcome.out) == (0, PROMPT + expected["text"] + "\n")
        assert outcome.err.startswith("12 tokens in ") and outcome.err.count("\n") == 1


def test_lines_of_json(run_gsa, story_checkpoint, expected):
    several = ["--prompt", PROMPT, "--prompt", "Tom", "--max-new-tokens", 12, "--json"]
    lines = [json.loads(line) for line in run_gsa("generate", story_checkpoint, *several).out.splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPT, "Tom"]
    without = {name: value for name, value in expected.items() if name != "logprobs"}
    assert lines[0] == without | {"finish_reason": "length"}
    (line,) = run_gsa("generate", story_checkpoint, *several[:2], *several[4:], "--logprobs").out.splitlines()
    assert json.loads(line)["logprobs"] == pytest.approx(expected["logprobs"], rel=1e-5)


def test_logprobs_are_printed_beside_tokens(run_gsa, story_checkpoint, expected):
    options = ["--prompt", PROMPT, "--max-new-tokens", 12, "--logprobs"]
    first, *lines = run_gsa("generate", story_checkpoint, *options).out.splitlines()
    assert first == PROMPT + expected["text"]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(expected["logprobs"], abs=1e-4)
    assert run_gsa("generate", story_checkpoint, *options, "--stream").out.splitlines() == [first, *lines]


def test_options_reach_the_loop(run_gsa, story_checkpoint, expected):
    options = ["generate", story_checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12]
    stopped = run_gsa(*options, "--stop", "nowhere", "--stop", expected["text"][5:9])
    assert stopped.out == PROMPT + expected["text"][:5] + "\n"
    model, tokenizer = load(story_checkpoint), open_tokenizer(story_checkpoint)
    for more in ({"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}):
        (there,) = complete(model, PROMPT, tokenizer=tokenizer, max_new_tokens=12, **more)
        assert there.text != expected["text"]
        assert run_gsa(*options, *pairs(more)).out == PROMPT + there.text + "\n"
    more = {"temperature": 2.0, "min_p": 0.01, "top_p": 0.9, "top_k": 40}
    (there,) = complete(
        model, PROMPT, tokenizer=tokenizer, max_new_tokens=12, sampler=make_sampler(**more), seed=4, min_new_tokens=12
    )
    assert run_gsa(*options, *pairs(more), "--seed", 4, "--min-new-tokens", 12).out == PROMPT + there.text + "\n"


def test_prompts_from_a_file_and_from_stdin(run_gsa, story_checkpoint, tmp_path, monkeypatch):
    def prompts(*options: object) -> list[str]:
        outcome = run_gsa("generate", story_checkpoint, *options, "--max-new-tokens", 1, "--json")
        return [json.loads(line)["prompt"] for line in outcome.out.splitlines()]

    (tmp_path / "prompts.txt").write_bytes(" caf\u00e9 \r\n\nTom\n".encode())
    assert prompts("--prompt-file", tmp_path / "prompts.txt") == [" caf\u00e9 ", "Tom"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\nb", "more": 1}\n"c"\n')
    assert prompts("--prompt", "first", "--prompt-file", tmp_path / "prompts.jsonl") == ["first", "a\nb", "c"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("x\u4f60\n".encode())))
    assert prompts("--prompt-file", "-") == ["x\u4f60"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "no prompt in it"),
        ("a.txt", b" \n\n", "no prompt in it"),
        ("a.txt", b"Once\n\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}', "line 1: no prompt in it"),
        ("a.jsonl", b"[3]", "line 1: no prompt in it"),
        ("b.txt", None, "no such file"),
    ],
)
def test_a_file_without_prompts_is_refused(run_gsa, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = run_gsa("generate", tmp_path, "--prompt-file", tmp_path / name)
    outcome.assert_refused(tmp_path / name, words)


def test_a_closed_stdin_has_no_prompts(run_gsa, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    run_gsa("generate", tmp_path, "--prompt-file", "-").assert_refused("stdin: is closed")


def test_requests_that_contradict_themselves(run_gsa, story_checkpoint):
    run_gsa("generate", story_checkpoint).assert_refused("no prompt given", "--prompt-file")
    run_gsa("generate", story_checkpoint, "--prompt", "a", "--stream", "--json").assert_refused("--stream", "--json")
    run_gsa("generate", story_checkpoint, "--prompt", "a", "--stop", "").assert_refused("stop", "empty")
    run_gsa("generate", story_checkpoint, "--prompt", "a", "--seed", -1).assert_refused("seed = -1", "4294967295")
    # what the operating system hands over where an argument is not UTF-8
    run_gsa("generate", story_checkpoint, "--prompt", "caf\udce9").assert_refused("prompt 0 is not UTF-8")


def test_what_the_folder_says_stands_until_an_option_does(run_gsa, story_checkpoint, tmp_path, expected):
    shutil.copytree(story_checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "generation_config.json"
    options = ["generate", tmp_path / "checkpoint", "--prompt", PROMPT]
    ends = expected["tokens"][4]
    file.write_text(json.dumps({"eos_token_id": [0, ends], "max_new_tokens": 6, "num_beams": 4}))
    outcome = run_gsa(*options, "--json")
    line = json.loads(outcome.out)
    assert line["tokens"] == expected["tokens"][: expected["tokens"].index(ends) + 1] and line["finish_reason"] == "eos"
    assert "gsa: generation_config.json: num_beams = 4 is not supported, and ignored\n" in outcome.err
    file.write_text(json.dumps({"do_sample": True, "temperature": 5.0, "max_new_tokens": 6}))
    assert json.loads(run_gsa(*options, "--json").out)["tokens"] != expected["tokens"][:6]
    outcome = run_gsa(*options, "--temperature", 0, "--max-new-tokens", 7, "--json")
    assert json.loads(outcome.out)["tokens"] == expected["tokens"][:7]
    file.write_text("{")
    run_gsa(*options).assert_refused(file, "not JSON")


def test_a_terminal_that_cannot_show_a_character(run_gsa, story_checkpoint, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    outcome = run_gsa("generate", story_checkpoint, "--prompt", "caf\u00e9", "--max-new-tokens", 1)
    assert outcome.code == 0 and written.getvalue().startswith(rb"caf\xe9")


def run_into_a_closed_pipe(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "gsa_jax.cli", *map(str, arguments)]
        return subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)


def test_a_closed_pipe_is_a_quiet_end():
    done = run_into_a_closed_pipe("--help")
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_behind_stdout_is_one_line():
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "gsa_jax.cli", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, b"gsa: the disk is full; what was printed is not all there\n")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--stream"], ["--json"]], ids=str)
def test_a_closed_pipe_ends_generation_quietly(story_checkpoint, more):
    done = run_into_a_closed_pipe("generate", story_checkpoint, "--prompt", PROMPT, "--max-new-tokens", 5, *more)
    assert done.returncode == 141 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr
