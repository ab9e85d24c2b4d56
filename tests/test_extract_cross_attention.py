"""extract_cross_attention: one call gives what a capture and the analysis of it give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import Listed, llava, picture, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis.cross_attention import cross_attention
from mechanistic.analysis.plot_cross_attention_attribution import plot_cross_attention_attribution
from mechanistic.capture import LoadedModel, capture_run, extract_cross_attention
from mechanistic.store import open_run
from mechanistic.store.errors import CaptureError, UsageError


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


def test_extract_cross_attention__is_the_block_that_analysis_finds(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    sample = samples(1)[0]
    capture_run(
        loaded,
        Listed((sample,)),
        tmp_path / "run",
        sites=["text.*.q", "text.*.k"],
        max_new_tokens=0,
        quiet=True,
    )
    expected = cross_attention(open_run(tmp_path / "run"), sample=0)["cross_attention"]
    image, text = sample.images[0], sample.question
    got = extract_cross_attention(loaded.model, image, text, processor=loaded.processor)
    assert got.dims == expected.dims
    assert got["word"].values.tolist() == expected["word"].values.tolist()
    np.testing.assert_allclose(got.values, expected.values, rtol=0, atol=1e-5)
    for name in ("image_index", "patch_row", "patch_col", "box_x0", "box_y1"):
        np.testing.assert_array_equal(got[name].values, expected[name].values)
    some = ["red", "square", "blue", "circle"]
    figure, _ = plot_cross_attention_attribution(
        image=image, text_tokens=some, cross_attention=got, num_patches=16, save_path=tmp_path / "words.png"
    )
    assert len(figure.axes) >= 4


def test_extract_cross_attention__is_true_cross_attention_where_there_is_one(tmp_path: Path) -> None:
    crossing, sample = ZOO["mllama"].build(), zoo_samples(ZOO["mllama"])[1]
    sites = ["text.*.xq", "text.*.xk"]
    capture_run(crossing, Listed((sample,)), tmp_path / "run", sites=sites, max_new_tokens=0, quiet=True)
    expected = cross_attention(open_run(tmp_path / "run"), sample=0)["cross_attention"]
    got = extract_cross_attention(crossing, sample.images, sample.question)
    assert got.attrs["computed_from"] == "xq and xk"
    assert got["layer"].values.tolist() == [1]
    assert set(got["image_index"].values.tolist()) == {0, 1}
    np.testing.assert_allclose(got.values, expected.values, rtol=0, atol=1e-5)
    for name in ("image_index", "tile", "patch_row", "patch_col", "box_x0", "box_y1"):
        np.testing.assert_array_equal(got[name].values, expected[name].values)


def test_extract_cross_attention__says_what_is_missing(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="processor=processor"):
        extract_cross_attention(loaded.model, picture(0), "where is it ?")
    with pytest.raises(UsageError, match="no word"):
        extract_cross_attention(loaded, picture(0), " ")
    with pytest.raises(UsageError, match=r"No layer 7 .*\n  Those that do: 0, 1, 2"):
        extract_cross_attention(loaded, picture(0), "where is the red square ?", layer=7)
    with pytest.raises(CaptureError, match="attends to image tokens"):
        extract_cross_attention(loaded, [], "where is the red square ?")
