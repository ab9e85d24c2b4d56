"""Roles: words of the question found by characters, and the tokens that carry them."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import llava, picture, samples

from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.dataset import Sample
from mechanistic.capture.prompts import build_prompt, encode_prompts
from mechanistic.capture.roles import find_phrase, role_spans, tokens_in
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import CaptureError


def sample(question: str, **fields: object) -> Sample:
    given = {"options": (), "answer": None, **fields}
    return Sample(sample_id="s", images=(picture(0),), question=question, **given)  # type: ignore[arg-type]


def test_find_phrase__finds_whole_words_in_any_case() -> None:
    assert find_phrase("The person is on the Phone, on", "on") == [(14, 16), (28, 30)]


def test_find_phrase__reads_underscores_and_runs_of_spaces_as_one_space() -> None:
    assert find_phrase("a cup left  of it", "left_of") == [(6, 14)]


@pytest.mark.parametrize("phrase", ["", " ", "_"])
def test_find_phrase__finds_nothing_for_nothing(phrase: str) -> None:
    assert find_phrase("a cup", phrase) == []


def test_role_spans__leaves_a_mention_inside_a_longer_one_out() -> None:
    spans = role_spans(sample("is the cup on the cup holder", subject="cup", object="cup holder"))
    assert spans["subject"] == [(7, 10)]
    assert spans["object"] == [(18, 28)]


def test_role_spans__has_none_for_what_is_not_mentioned() -> None:
    spans = role_spans(sample("where is it ?", subject="cup", object="plate", relation="left"))
    assert not any(spans.values())


def test_tokens_in__counts_overlap_and_not_touch() -> None:
    offsets = np.array([[0, 3], [3, 6], [6, 6], [5, 9], [9, 12]])
    assert tokens_in([(3, 6)], offsets).tolist() == [False, True, False, True, False]


@pytest.fixture(scope="module")
def batch() -> Batch:
    loaded = llava()
    texts = TokenTexts(loaded.tokenizer)
    return prepare_batch(loaded, samples(4, images=(1, 2)), 7, max_new_tokens=2, texts=texts)


def words(batch: Batch, row: int, column: str) -> list[str]:
    table = batch.decoder[row]
    return table["token_text"][table[column].astype(bool)].tolist()


@pytest.mark.parametrize("row", range(4))
def test_decoder_table__marks_the_words_of_each_role(batch: Batch, row: int) -> None:
    assert words(batch, row, "is_subject") == ["red", "square"]
    assert words(batch, row, "is_object") == ["blue", "circle"]
    assert words(batch, row, "is_last_prompt") == ["assistant"]
    assert words(batch, row, "is_relation") == []


@pytest.mark.parametrize("row", range(4))
def test_decoder_table__tells_question_template_image_and_answer_apart(batch: Batch, row: int) -> None:
    table, question = batch.decoder[row], batch.samples[row].question
    kind = table["kind"]
    assert table["token_text"][kind == 0].tolist() == question.split()
    assert table["token_text"][kind == 2].tolist() == ["<s>", "user", "assistant"]
    assert (kind == 1).sum() == 64 * len(batch.samples[row].images)
    assert (kind == 3).sum() == len(batch.answers[row])
    assert table["sample_index"].tolist() == [7 + row] * len(kind)
    images = table["image_index"][kind == 1]
    assert images.tolist() == np.repeat(np.arange(len(batch.samples[row].images)), 64).tolist()
    assert (table["image_index"][kind != 1] == -1).all()


def test_decoder_table__same_word_elsewhere_in_the_prompt_is_no_role() -> None:
    loaded = llava()
    question = "where is the user relative to the assistant ?"
    one = sample(question, subject="user", object="assistant")
    batch = prepare_batch(loaded, [one], 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))
    table = batch.decoder[0]
    # The template has both words too, before and behind the question.
    assert table["token_text"].tolist().count("user") == 2
    assert table["position"][table["is_subject"]].tolist() == [69]
    assert table["position"][table["is_object"]].tolist() == [73]


def test_build_prompt__refuses_a_template_that_changes_the_question() -> None:
    processor = llava().processor
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] | upper }}"
    with pytest.raises(CaptureError, match="changed its question"):
        build_prompt(processor, samples(1)[0])


def test_build_prompt__without_a_template_is_images_then_question() -> None:
    processor = llava().processor
    processor.chat_template = None
    prompt = build_prompt(processor, samples(2, images=(1, 2))[1])
    assert prompt.text.startswith("<image><image>where is")
    assert prompt.text[slice(*prompt.question)] == samples(2)[1].question


def test_encode_prompts__refuses_a_processor_that_moves_the_question() -> None:
    processor = llava().processor
    prompts = [build_prompt(processor, samples(1)[0])]

    class Adds(type(processor)):  # type: ignore[misc]
        def __call__(self, text: list[str], **kwargs: object) -> object:
            return super().__call__(text=[f"{each} ." for each in text], **kwargs)

    processor.__class__ = Adds
    with pytest.raises(CaptureError, match="changes the prompt around a question"):
        encode_prompts(processor, prompts, [[picture(0)]])
