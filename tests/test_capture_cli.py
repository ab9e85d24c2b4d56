"""`mechanistic capture`: the whole command on the bundled model, its price, its help and its errors."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from mechanistic.analysis.cli import main
from mechanistic.capture.cli import add_commands
from mechanistic.capture.datasets import open_dataset
from mechanistic.capture.question_options import question_options
from mechanistic.capture.specification import DEFAULT_SITES, SITES, TOKENS
from mechanistic.store import open_run, site

ASK = ["capture", "--model-name", "spatial-tiny", "--dataset", "shapes"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main([*ASK, "--num-samples", "40", "--output-dir", str(path), "--batch-size", "16"]) == 0
    return path


def test_capture__default_specification_on_the_bundled_model(run: Path) -> None:
    held = open_run(run)
    samples = held["samples"].to_dataset()
    assert held.attrs["capture"]["sites"] == list(DEFAULT_SITES)
    assert held.attrs["model"]["name"] == "spatial-tiny"
    assert held.attrs["dataset"]["num_samples"] == 40
    assert float((samples.correct == 1).mean()) >= 0.9
    # The right option has the largest logit where the model is right.
    best = samples.option_logits.values.argmax(1)
    assert np.array_equal(best == samples.answer_index.values, samples.correct.values == 1)
    assert {"text/k", "text/q", "text/resid_post", "text/resid_post_last"} <= {
        g.strip("/") for g in held.groups
    }
    words = site(held, "text/q")
    subjects = words.token_text.values[words.is_subject.values]
    expected = " ".join(str(name) for name in samples.subject.values).split()
    assert subjects.tolist() == expected


def test_capture__again_has_nothing_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, "--num-samples", "40", "--output-dir", str(run), "--batch-size", "16"]) == 0
    assert "40 samples" in (out := capsys.readouterr().out)
    assert "already finished, nothing to do" in out


def test_capture__another_job_in_the_same_place_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASK, "--num-samples", "40", "--output-dir", str(run), "--batch-size", "8"]) == 2
    assert_two_lines(capsys, "finished run of another job: capture.batch_size is 16, not 8")


def test_capture__plan_prints_the_price_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert main([*ASK, "--output-dir", str(path), "--plan", "--sites", "text.*.z", "text.0.q[last]"]) == 0
    out = capsys.readouterr().out
    assert "text/z  (text.*.z[all])" in out
    assert "all 400 samples" in out
    assert "free on that disk" in out
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sites", "text.*.qq"], "There is no site 'qq'"),
        (["--sites", "text.9.q"], "There is no layer 9"),
        (["--dataset", "imagenet"], "There is no dataset 'imagenet'"),
        (["--model-name", "gpt9"], "There is no model 'gpt9'"),
        (["--device", "cpu", "--device-map", "auto"], "not both: 'cpu', 'auto'"),
        (["--model-option", "nonsense=3"], "unexpected keyword argument 'nonsense'"),
        (["--model-option", "dtype=float16", "--dtype", "float32"], "is given twice"),
        (["--max-new-tokens", "-1"], "max_new_tokens=-1"),
        (["--parts", "4"], "--parts goes with either --part or --scheduler"),
        (["--part", "1"], "--parts goes with either --part or --scheduler"),
        (["--parts", "4", "--part", "4"], "There is no part 4 of 4"),
        (["--parts", "4", "--scheduler", "tcp://127.0.0.1:9", "--part", "1"], "--parts goes with either"),
    ],
)
def test_capture__wrong_usage_is_two_lines_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main([*ASK, "--output-dir", str(tmp_path / "run"), *arguments]) == 2
    assert_two_lines(capsys, says)
    assert not (tmp_path / "run").exists()


def assert_two_lines(capsys: pytest.CaptureFixture[str], says: str) -> None:
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 2
    assert "Traceback" not in error


def test_capture__help_names_every_site_and_selection(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["capture", "--help"])
    text = capsys.readouterr().out
    for word in (*SITES, *TOKENS, *DEFAULT_SITES, "spatial-tiny", "shapes", "--plan", "exit code 2"):
        assert word in text


def test_capture__reads_a_table_as_its_options_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"asked": "Is the cat left of the dog?", "options": ["yes", "no"], "answer": 1}\n')
    ask = ["capture", "--model-name", "spatial-tiny", "--dataset", str(table), "--plan", "--output-dir"]
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    named = ["--columns", "question=asked", "--answer-is", "index", "--text-only"]
    args = parser.parse_args([*ask, str(tmp_path / "run"), *named])
    sample = open_dataset(str(table), **question_options(args))[0]
    assert (sample.question, sample.answer, sample.images) == ("Is the cat left of the dog?", "no", ())
    with pytest.raises(SystemExit):
        parser.parse_args([*ask, str(tmp_path / "run"), "--columns", "asked"])
    assert "'asked' is not FIELD=COLUMN, such as question=prompt" in capsys.readouterr().err
