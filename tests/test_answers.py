"""Answers: which option a text names, which token an option starts with, and where generation ends."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import llava, picture, samples

from mechanistic.capture.answers import OptionTokens, normalise, option_logits, option_tokens, score
from mechanistic.capture.dataset import Sample
from mechanistic.capture.prompts import append_tokens, build_prompt, encode_prompts, pad_left


def sample(answer: str | None, *options: str) -> Sample:
    return Sample("s", (picture(0),), "where ?", options, answer)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("on", 1),
        ("On.", 1),
        (" ON\n", 1),
        ("It is on the table", 1),
        ("left of", 0),
        ("left_of", 0),
        ("a person", 0),
        ("on or under", 0),
        ("", 0),
        ("no idea", 0),
    ],
)
def test_score__counts_options_and_not_substrings(said: str, expected: int) -> None:
    assert score(said, sample("on", "on", "under", "left of")) == expected


def test_score__an_option_inside_another_is_named_by_exact_answer_only() -> None:
    question = sample("front", "front", "in front of")
    assert score("front", question) == 1
    assert score("in front of", question) == 0


def test_score__unknown_answers_are_unscored_and_free_ones_must_be_equal() -> None:
    assert score("left", sample(None, "left", "right")) == -1
    assert score("Two dogs.", sample("two dogs")) == 1
    assert score("two dogs and a cat", sample("two dogs")) == 0


def test_normalise__drops_what_surrounds_an_answer() -> None:
    assert normalise(' "In-front_of".\n') == "in-front of"


def test_option_tokens__finds_each_first_token() -> None:
    tokenizer = llava().tokenizer
    found = option_tokens(tokenizer, "where ? assistant", ("left", "right"))
    assert found == OptionTokens(tuple(tokenizer.convert_tokens_to_ids(["left", "right"])), "")


def test_option_tokens__shared_and_unknown_ones_are_named() -> None:
    found = option_tokens(llava().tokenizer, "assistant ", ("left of", "left", "above", "beneath"))
    assert found.ids[:2] == (None, None)
    assert found.ids[2] is not None
    assert found.note == "first token shared: left, left of; no token of its own: beneath"


def test_option_logits__are_nan_where_an_option_has_no_token() -> None:
    logits = np.arange(10, dtype=np.float32)[None]
    values = option_logits(logits, [OptionTokens((3, None), "why")], 3)
    np.testing.assert_array_equal(values, [[3, np.nan, np.nan]])
    assert np.isnan(option_logits(None, [OptionTokens((3,), "")], 2)).all()


def test_padding__moves_left_and_answers_follow_their_prompt() -> None:
    loaded = llava()
    asked = samples(2)
    prompts = [build_prompt(loaded.processor, each) for each in asked]
    encoded = encode_prompts(loaded.processor, prompts, [[picture(0)], [picture(1)]])
    ids, lengths = encoded.inputs["input_ids"], encoded.lengths
    left = pad_left(encoded.inputs)
    grown = append_tokens(encoded.inputs, lengths, [[7], [8, 9]], 0)
    for row, length in enumerate(lengths):
        own = ids[row, :length].tolist()
        assert left["input_ids"][row, -length:].tolist() == own
        assert left["attention_mask"][row].sum() == length
        answer = [[7], [8, 9]][row]
        whole = grown["input_ids"][row][grown["attention_mask"][row].bool()].tolist()
        assert whole == own + answer
    assert lengths[0] != lengths[1]
    assert grown["pixel_values"] is encoded.inputs["pixel_values"]
