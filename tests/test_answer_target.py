"""The number that is explained: found among logits by word, by id, or by what the model prefers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from zoo_parts import HUB, VOCABULARY, tokenizer

from mechanistic.capture.answer_target import AnswerTarget, answer_target
from mechanistic.store.errors import ModelError, SpecificationError

WORDS = tokenizer()
LOGITS = torch.zeros(len(VOCABULARY))
for _word, _value in (("left", 3.0), ("right", 5.0), ("above", 4.0), ("cross", 9.0)):
    LOGITS[VOCABULARY[_word]] = _value
OPTIONS = ("left", "right", "above")


def find(target: Any, options: Any = OPTIONS, words: Any = WORDS, **labels: int) -> AnswerTarget:
    return answer_target(target, LOGITS, "where is it ? assistant", options, words, labels)


def bytes_and_pairs() -> Any:
    """A tokenizer as GPT-2's, which knows " left" as one token and "left" as two."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(["the left the left the left"] * 5, trainer)
    return HUB.PreTrainedTokenizerFast(tokenizer_object=words)


def test_answer_target__is_what_the_model_prefers() -> None:
    found = find(None)
    assert found.name == "right - above"
    assert found.of(LOGITS[None]).tolist() == [1.0]
    assert find(None, ()).name == "cross"
    assert find(None, ()).of(LOGITS[None].half()).dtype == torch.float32


def test_answer_target__is_what_was_asked_for() -> None:
    assert find(("left", "above")).of(torch.stack([LOGITS, 2 * LOGITS])).tolist() == [-1.0, -2.0]
    assert find("left").of(LOGITS[None]).tolist() == [3.0]
    by_id = find((VOCABULARY["left"], "above"))
    assert (by_id.name, by_id.of(LOGITS[None]).tolist()) == ("left - above", [-1.0])
    assert find("cat", (), None, cup=0, cat=1) == AnswerTarget(1, None, "cat")
    assert find(None, (), None, **VOCABULARY).name == "cross"


def test_answer_target__counts_tokens_as_they_follow_the_prompt() -> None:
    words = bytes_and_pairs()
    assert len(words("left")["input_ids"]) > 1
    found = answer_target("left", torch.zeros(400), "it is ASSISTANT:", (), words, {})
    assert words.convert_ids_to_tokens(found.plus) == "Ġleft"
    with pytest.raises(
        SpecificationError, match=r"splits 'left' into \d tokens.*\n  Choose target=\('left', "
    ):
        answer_target("left", torch.zeros(400), "assistant\n", (), words, {})
    # Of two words, the first token of each is enough to tell them apart.
    pair = answer_target(("left", "zebra"), torch.zeros(400), "assistant\n", (), words, {})
    assert pair.plus != pair.minus


def test_answer_target__says_what_is_wrong() -> None:
    for target, match in (
        ("zebra", "cannot be told apart by one token"),
        (("left", "left"), "first token shared"),
        (("left", VOCABULARY["left"]), "always 0"),
        (-1, "no logit -1"),
    ):
        with pytest.raises(SpecificationError, match=match):
            find(target)
    with pytest.raises(SpecificationError, match=r"no class dog.\n  It has: cup, cat\."):
        find("dog", (), None, cup=0, cat=1)
    with pytest.raises(ModelError, match="has no words"):
        find("dog", (), None)
