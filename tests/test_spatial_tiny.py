"""The bundled model: what it gets right, what it cannot know, how it is stored, and how it was trained."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mechanistic.capture.dataset import Sample, open_image
from mechanistic.capture.shapes import Shapes
from mechanistic.capture.shapes_drawing import COLOURS, HELD_OUT_PAIRS, RELATIONS, SHAPES, Thing, draw
from mechanistic.capture.train_architecture import VOCABULARY, build_model, build_processor
from mechanistic.capture.train_batches import LONGEST, PREFIX, packed_batch
from mechanistic.capture.train_evaluation import accuracy, answers, blanked
from mechanistic.capture.train_model_card import file_sha256
from mechanistic.capture.train_scenes import IGNORED, patch_names, question, random_question, random_scene
from mechanistic.capture.train_spatial_tiny import main, train_spatial_tiny
from mechanistic.capture.train_stages import Recipe, train
from mechanistic.store.errors import OutputExistsError

FOLDER = Path(str(files("mechanistic.capture"))) / "spatial_tiny"
SHORT = Recipe(patch_steps=3, caption_steps=3, question_steps=3, patch_scenes=4, scenes=3)


@pytest.fixture(scope="module")
def held_out() -> list[Sample]:
    return list(Shapes(400, seed=20, distractor=0))


def test_spatial_tiny__knows_held_out_pairs(held_out: list[Sample]) -> None:
    assert accuracy(FOLDER, held_out) >= 0.97


def test_spatial_tiny__knows_them_beside_a_distractor() -> None:
    assert accuracy(FOLDER, Shapes(400, seed=20, distractor=1)) >= 0.9


def test_spatial_tiny__needs_the_image(held_out: list[Sample]) -> None:
    assert accuracy(FOLDER, blanked(held_out)) <= 0.4


def test_spatial_tiny__answers_one_word_and_stops(held_out: list[Sample]) -> None:
    assert set(answers(FOLDER, held_out[:60])) == set(RELATIONS)


def test_spatial_tiny__is_small_and_is_what_its_card_says() -> None:
    weights = FOLDER / "model.safetensors"
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000
    assert f"`{file_sha256(weights)}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_spatial_tiny__is_stored_as_bfloat16_and_generates_greedily() -> None:
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == VOCABULARY["</s>"]
    assert generation["do_sample"] is False


def test_spatial_tiny__processor_is_the_one_that_the_script_builds(held_out: list[Sample]) -> None:
    bundled: Any = AutoProcessor.from_pretrained(FOLDER)  # type: ignore[no-untyped-call]
    built = build_processor()
    assert bundled.chat_template == built.chat_template
    assert bundled.tokenizer.get_vocab() == built.tokenizer.get_vocab() == VOCABULARY
    image, text = open_image(held_out[0].images[0]), f"user <image> {held_out[0].question} assistant"
    one, other = (processor(images=image, text=text, return_tensors="pt") for processor in (bundled, built))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_train__is_the_same_to_the_bit_for_one_seed() -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    told: list[str] = []
    first, second = train(SHORT, told.append).state_dict(), train(SHORT, told.append).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line.split(":")[0] for line in told[:3]] == [
        "1/3 naming patches",
        "2/3 captions",
        "3/3 questions and captions",
    ]
    assert all("left" in line for line in told)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_train_spatial_tiny__writes_a_folder_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    measured = train_spatial_tiny(folder, SHORT, lambda line: None, samples=8)
    assert measured.samples == 8
    assert {path.name for path in folder.iterdir()} == {path.name for path in FOLDER.iterdir()}
    assert f"`{file_sha256(folder / 'model.safetensors')}`" in (folder / "README.md").read_text(
        encoding="utf-8"
    )
    with pytest.raises(
        OutputExistsError, match=r"new' exists and is not an empty folder\.\n  Name a new folder"
    ):
        train_spatial_tiny(folder, SHORT, lambda line: None)


def test_main__refuses_a_folder_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["--output-dir", str(tmp_path)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_random_scene__draws_no_held_out_pair() -> None:
    rng = np.random.default_rng(0)
    drawn = [thing.pair for _ in range(300) for thing in random_scene(rng, 3)]
    assert not HELD_OUT_PAIRS & set(drawn)


def test_random_question__has_its_answer_as_target() -> None:
    rng = np.random.default_rng(0)
    blocks = [random_question(random_scene(rng, 3), rng) for _ in range(400)]
    assert 0.5 < np.mean([block.about_relation for block in blocks]) < 0.7
    assert len({block.words[:3] for block in blocks}) == 5
    for block in blocks:
        (before, answer), (last, end) = block.targets
        assert block.words[before : last + 1] == ("assistant", answer)
        assert end == "</s>"
        assert len(block.words) <= LONGEST
        assert set(block.words) <= set(VOCABULARY)


def test_patch_names__by_hand() -> None:
    # A red square on the corner of the patches 1 and 2: centres of the four patches are 5.7 pixels away.
    red = Thing("red", "square", 16, 16, 8, (220, 40, 40))
    colours, shapes = (names.reshape(8, 8) for names in patch_names([red]))
    assert (colours[1:3, 1:3] == list(COLOURS).index("red")).all()
    assert (shapes[1:3, 1:3] == SHAPES.index("square")).all()
    assert colours[0, 1] == shapes[1, 3] == IGNORED
    assert (colours[4:, 4:] == len(COLOURS)).all()
    assert colours[0, 0] == len(COLOURS)


def test_packed_batch__a_text_is_to_the_model_what_it_is_alone() -> None:
    texts = [
        question("where is the red square ?", "left"),
        question("which row is the red object in ?", "top"),
    ]
    batch = packed_batch(np.random.default_rng(0), 2, 0.5, lambda things: texts)
    model = build_model(0).eval()
    with torch.inference_mode():
        packed = model(**batch.inputs).logits[0]
        for number, text in enumerate(texts):
            ids = torch.tensor([[*PREFIX, *(VOCABULARY[word] for word in text.words)]])
            alone = model(input_ids=ids, pixel_values=batch.inputs["pixel_values"][:1]).logits[
                0, len(PREFIX) :
            ]
            start = len(PREFIX) + number * LONGEST
            torch.testing.assert_close(packed[start : start + len(alone)], alone, atol=1e-5, rtol=1e-5)
    answers_at = torch.nonzero(batch.labels[0] == VOCABULARY["top"]).ravel().tolist()
    assert answers_at == [len(PREFIX) + LONGEST + len(texts[1].words) - 2]


def test_build_processor__makes_the_pixels_that_training_draws() -> None:
    rng = np.random.default_rng(0)
    image = draw([Thing("red", "square", 16, 16, 8, (220, 40, 40))], (230, 230, 230), 5, rng)
    inputs = build_processor()(
        images=Image.fromarray(image),
        text="user <image> where is the red square ? assistant",
        return_tensors="pt",
    )
    expected = image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), expected, atol=1e-6)
    assert inputs["input_ids"][0, : len(PREFIX)].tolist() == list(PREFIX)
