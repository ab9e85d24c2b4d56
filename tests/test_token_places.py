"""Places by name: roles, boxes, background, positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mechanistic.analysis.token_places import default_places, place_masks
from mechanistic.capture import Shapes, load_model
from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, SpecificationError


@pytest.fixture(scope="module")
def batch() -> Batch:
    model = load_model("spatial-tiny")
    return prepare_batch(
        model, list(Shapes(4)), 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer), generate=False
    )


def masks(batch: Batch, places: list[Any]) -> np.ndarray[Any, Any]:
    """(place, sample, token)."""
    return place_masks(
        batch.decoder,
        [sample.extra for sample in batch.samples],
        places,
        [sample.sample_id for sample in batch.samples],
    )


def test_place_masks__boxes_and_background_divide_the_image(batch: Batch) -> None:
    found = masks(
        batch, ["subject_box", "object_box", "background", "image", "last", "subject", 3, "@-1", "all"]
    )
    subject, other, background, image, last, named, third, end, every = found
    assert not (subject & other).any()
    np.testing.assert_array_equal(subject | other | background, image)
    assert (image.sum(1) == 64).all()
    assert ((subject.sum(1) > 0) & (subject.sum(1) < 20)).all()
    np.testing.assert_array_equal(last, end)
    assert third[:, 3].all()
    assert (third.sum(1) == 1).all()
    assert (named.sum(1) == 2).all()
    assert every.all()
    # The patches of a box are where the object was drawn.
    for row, sample in enumerate(batch.samples):
        table = batch.decoder[row]
        middle = float(sample.extra["subject_x"]), float(sample.extra["subject_y"])
        inside = (table["box_x0"] <= middle[0]) & (middle[0] < table["box_x1"])
        inside &= (table["box_y0"] <= middle[1]) & (middle[1] < table["box_y1"])
        assert subject[row][inside].all()


def test_place_masks__padding_is_at_no_place(batch: Batch) -> None:
    short = {name: values[:70] for name, values in batch.decoder[0].items()}
    found = place_masks([short, batch.decoder[1]], [{}, {}], ["all"], ["a", "b"])
    assert found.shape == (1, 2, len(batch.decoder[1]["position"]))
    assert found[0, 0].sum() == 70


def test_default_places__are_those_that_all_samples_have(batch: Batch) -> None:
    extras = [sample.extra for sample in batch.samples]
    boxes = ("subject_box", "object_box", "background", "subject", "object", "last")
    assert default_places(batch.decoder, extras) == boxes
    assert default_places(batch.decoder, [{}] * 4) == ("image", "subject", "object", "last")


def test_place_masks__refuses_a_place_that_is_not_there(batch: Batch) -> None:
    with pytest.raises(DataError, match=r"'shapes-held_out-0-00000' has no token at '@99', of its 78 tokens"):
        masks(batch, [99])
    with pytest.raises(DataError, match="has no token at 'relation'"):
        masks(batch, ["relation"])
    with pytest.raises(DataError, match="has no token at 'cat_box'"):
        masks(batch, ["cat_box"])
    with pytest.raises(SpecificationError, match="no token selection 'verb'"):
        masks(batch, ["verb"])
