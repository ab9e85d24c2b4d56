"""Question texts taken apart and put together again."""

from __future__ import annotations

import doctest
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechanistic.capture.question_text import (
    listed,
    mentions,
    order_of_mention,
    parse_question,
    same_name,
    show_options,
    shuffled,
    strip_markup,
    without_markup,
)

FOUR = ("left", "right", "on", "under")


def test_question_text__doctest() -> None:
    module = importlib.import_module("mechanistic.capture.question_text")
    results = doctest.testmod(module)
    assert (results.failed, results.attempted) == (0, 3)


@pytest.mark.parametrize(
    ("published", "subject", "other", "options"),
    [
        (
            "<image>\nUSER: Where is the beer bottle in relation to the armchair? "
            "Answer with left, right, on or under.\nASSISTANT:",
            "beer bottle",
            "armchair",
            FOUR,
        ),
        (
            "<image>\nUSER:  Where are the sunglasses in relation to the chair? \n\n"
            "Answer with left, right, on, or under..\n\nASSISTANT:",
            "sunglasses",
            "chair",
            FOUR,
        ),
        ("Where is the TV in the photo? Answer with top or bottom.", "TV", "", ("top", "bottom")),
        (
            "Where is the car in relation to stop sign? Answer with one word or phrase.",
            "car",
            "stop sign",
            (),
        ),
        ("Where is a cat in the image?", "cat", "", ()),
        ("where is the lion in relation to the thesis ?", "lion", "thesis", ()),
    ],
)
def test_parse_question__reads_published_texts(
    published: str, subject: str, other: str, options: tuple[str, ...]
) -> None:
    parsed = parse_question(published)
    assert parsed is not None
    assert (parsed.subject, parsed.object, parsed.options, parsed.surplus) == (subject, other, options, "")
    assert parsed.sentence[slice(*parsed.subject_span)] == subject
    assert parsed.sentence.endswith("?")
    assert not parsed.sentence.endswith(" ?")


def test_parse_question__keeps_what_follows_the_options_apart() -> None:
    parsed = parse_question(
        "Where is the man in the photo?\nAnswer with left or right.\nOption A to the right."
    )
    assert parsed is not None
    assert parsed.surplus == "Option A to the right."
    assert parsed.text(("right", "left")) == "Where is the man in the photo? Answer with right or left."
    assert parsed.text() == "Where is the man in the photo? Answer with left or right."


@pytest.mark.parametrize("text", ["Is the cup left of the plate?", "", "Where? Answer with left or right."])
def test_parse_question__gives_none_for_another_wording(text: str) -> None:
    assert parse_question(text) is None


def test_strip_markup__leaves_the_question() -> None:
    assert strip_markup("<image>\nUSER:  What  is it?\nASSISTANT:") == "What is it?"
    assert without_markup("<image>\nUSER: A\n  B\nASSISTANT: ") == "A\n  B"
    assert strip_markup("What is it?") == "What is it?"


def test_listed__reads_like_a_sentence() -> None:
    assert listed(("a", "b", "c")) == "a, b or c"
    assert listed(("a", "b"), "and") == "a and b"
    assert listed(("a",)) == "a"
    assert listed(()) == ""


def test_shuffled__is_a_permutation_fixed_for_ever() -> None:
    assert shuffled(FOUR, seed=0, key="7") == shuffled(FOUR[::-1], seed=0, key="7")
    assert sorted(shuffled(FOUR, seed=3, key="x")) == sorted(FOUR)
    # Written down once: stored runs depend on it.
    assert shuffled(FOUR, seed=0, key="0") == ("on", "left", "right", "under")


def test_shuffled__puts_every_option_everywhere_about_equally_often() -> None:
    orders = [shuffled(FOUR, seed=5, key=str(row)) for row in range(4000)]
    for option in FOUR:
        counts = [sum(order[place] == option for order in orders) for place in range(4)]
        assert max(abs(count - 1000) for count in counts) < 120
    assert len(set(orders)) == 24


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where? Answer with left, right, on or under.", "Where? Answer with on, under, left or right."),
        ("Pick one: left/right/on/under", "Pick one: on/under/left/right"),
        ('"right", "left", "under", or "on"?', '"on", "under", "left", or "right"?'),
        ("Is it Left, Right, On or Under it?", "Is it on, under, left or right it?"),
        # The last list counts, and what is no list stays.
        ("left or right? left, right, on or under", "left or right? on, under, left or right"),
    ],
)
def test_show_options__rewrites_a_list_and_nothing_else(text: str, expected: str) -> None:
    assert show_options(text, ("on", "under", "left", "right")) == expected


@pytest.mark.parametrize(
    "text", ["Where is it?", "A. left B. right C. on D. under", "left, left, on or under"]
)
def test_show_options__gives_none_without_a_list(text: str) -> None:
    assert show_options(text, FOUR) is None


def test_show_options__finds_whole_words_only() -> None:
    assert show_options("the person, on or off", ("off", "on")) == "the person, off or on"
    assert show_options("person, offline", ("off", "on")) is None


@given(
    st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=2, max_size=5, unique=True),
    st.randoms(use_true_random=False),
)
def test_show_options__shows_exactly_the_order_asked_for(options: list[str], unused: object) -> None:
    wanted = shuffled(options, seed=1, key="k")
    text = show_options(f"Q? Answer with {listed(options)}.", wanted)
    assert text == f"Q? Answer with {listed(wanted)}."


def test_order_of_mention__is_the_order_in_the_text() -> None:
    assert order_of_mention("A. right B. left", ("left", "right")) == ("right", "left")
    assert order_of_mention("the person is left", ("on", "left")) is None


def test_mentions__compares_whole_words_in_singular_or_plural() -> None:
    assert mentions("A photo of a green trees", "green tree")
    assert mentions("The Toy boat", "toy-boat")
    assert mentions("two buses", "bus")
    assert mentions("a bus", "buses")
    assert not mentions("The handbag contains the cat.", "andbag")
    assert not mentions("a person", "on")
    assert not mentions("anything", "")


def test_same_name__ignores_case_hyphens_and_plural() -> None:
    assert same_name("beer-bottle", "Beer bottle")
    assert same_name("glove", "gloves")
    assert same_name("gloves", "glove")
    assert same_name("buses", "bus")
    assert not same_name("glass", "grass")
