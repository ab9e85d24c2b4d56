"""Spoiled images and embeddings: what is promised of their size; they serve as the other of a pair."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_models import llava, picture, samples

from mechanistic.analysis import attribution_patching
from mechanistic.capture.corruptions import corrupt_image, corrupt_images, embedding_noise
from mechanistic.capture.dataset import Sample, open_image
from mechanistic.store.errors import DataError, SpecificationError


def pixels(sample: Sample) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The first image."""
    return np.asarray(open_image(sample.images[0]), np.float64)


def test_corrupt_image__blurs_averages_and_adds_noise() -> None:
    (sample,) = samples(1)
    clean = pixels(sample)
    blurred = pixels(corrupt_image(sample, "blur"))
    assert blurred.std() < 0.2 * clean.std()
    np.testing.assert_allclose(blurred.mean((0, 1)), clean.mean((0, 1)), atol=3)
    weak = pixels(corrupt_image(sample, "blur", strength=0.01))
    assert np.abs(weak - clean).mean() < np.abs(blurred - clean).mean()
    mean = pixels(corrupt_image(sample, "mean"))
    np.testing.assert_array_equal(mean, np.broadcast_to(np.rint(clean.mean((0, 1))), clean.shape))
    grey = Sample("grey", (Image.fromarray(np.full((64, 64, 3), 128, np.uint8)),), "what ?")
    np.testing.assert_array_equal(pixels(corrupt_image(grey, "noise")), 128)
    noisy = pixels(corrupt_image(sample, "noise", strength=0.1))
    inside = (clean > 60) & (clean < 195)
    assert (noisy - clean)[inside].std() == pytest.approx(0.1 * clean.std(), rel=0.05)


def test_corrupt_image__changes_the_pixels_alone_and_by_seed() -> None:
    data = samples(4, images=[1, 2])
    spoiled = corrupt_images(data, "noise", seed=5)
    assert [each.question for each in spoiled] == [each.question for each in data]
    assert [len(each.images) for each in spoiled] == [1, 2, 1, 2]
    assert corrupt_images(data, "noise", seed=5)[3].images == spoiled[3].images
    assert corrupt_images(data, "noise", seed=6)[3].images != spoiled[3].images
    assert open_image(spoiled[1].images[0]).size == picture(0).size


def test_corrupt_image__refuses_what_cannot_be_spoiled() -> None:
    (sample,) = samples(1)
    with pytest.raises(SpecificationError, match="no corruption 'swap' of an image"):
        corrupt_image(sample, "swap")  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="strength of the corruption is 0"):
        corrupt_image(sample, "blur", strength=0.0)
    with pytest.raises(DataError, match="has no image to corrupt"):
        corrupt_image(Sample("words", (), "what ?"), "mean")


def test_embedding_noise__depends_on_the_sample_and_the_copy_not_on_the_batch() -> None:
    where = np.zeros((3, 5), bool)
    where[0, 1:3] = where[2, 4] = True
    noise = embedding_noise(where, 1000, scale=2.0, copies=2, seed=1, start=7).unflatten(0, (2, 3))
    assert float(noise[:, ~where].abs().max()) == 0
    assert float(noise[:, where].std()) == pytest.approx(2, rel=0.05)
    assert abs(float((noise[0, 0, 1] * noise[1, 0, 1]).mean())) < 0.5
    alone = embedding_noise(where[2:], 1000, scale=2.0, copies=2, seed=1, start=9).unflatten(0, (2, 1))
    np.testing.assert_array_equal(alone[:, 0], noise[:, 2])


def test_corrupt_images__serve_as_the_other_of_a_pair() -> None:
    data = samples(2)
    both = [*data, *corrupt_images(data, "mean")]
    got = attribution_patching(
        both,
        llava(),
        pairs=[(0, 2), (1, 3)],
        site="resid_pre",
        places=["image", "text"],
        min_difference=0.0,
        top=6,
        quiet=True,
    )
    # Only the image differs, so at the input it carries everything.
    np.testing.assert_allclose(got.exact_share.sel(layer=0), [1, 0], atol=1e-4)
