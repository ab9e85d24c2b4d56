"""Samples and their images: what is kept, and what is refused by name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mechanistic.capture.dataset import ImageError, Sample, encode_png, load_image, open_image
from mechanistic.store.errors import DatasetError, UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(PIXELS).save(path)
    return path


def test_sample__answer_index_is_the_place_among_the_options() -> None:
    options = ("right", "left")
    assert Sample("1", (), "where?", options, "left").answer_index == 1
    assert Sample("1", (), "where?", options).answer_index == -1
    assert Sample("1", (), "where?", (), "on the table").answer_index == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", (), "where?"), "has no sample_id"),
        (("1", (), "where?", ("left", "left")), "Sample '1' has an option twice: left, left"),
        (
            ("1", (), "where?", ("left", "right"), "up"),
            "'up' is not one of its options.\n  Use one of left",
        ),
    ],
)
def test_sample__refuses_what_cannot_be_scored(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        Sample(*arguments)  # type: ignore[arg-type]


def test_load_image__keeps_the_bytes_of_a_file(jpeg: Path) -> None:
    loaded = load_image(jpeg)
    assert loaded.encoded == jpeg.read_bytes()
    assert loaded.sha256 == hashlib.sha256(jpeg.read_bytes()).hexdigest()
    assert (loaded.width, loaded.height, loaded.pixels.mode) == (7, 5, "RGB")
    assert load_image(str(jpeg)).sha256 == load_image(jpeg.read_bytes()).sha256 == loaded.sha256


def test_load_image__encodes_what_is_in_memory_without_loss() -> None:
    image = Image.fromarray(PIXELS)
    image.info["comment"] = "not part of the pixels"
    loaded = load_image(image)
    assert loaded.encoded == encode_png(Image.fromarray(PIXELS))
    np.testing.assert_array_equal(np.asarray(open_image(loaded.encoded)), PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_open_image__is_always_rgb(mode: str) -> None:
    assert open_image(Image.fromarray(PIXELS).convert(mode)).mode == "RGB"


def test_open_image__turns_a_photo_upright(tmp_path: Path) -> None:
    image, path = Image.fromarray(PIXELS), tmp_path / "turned.png"
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(path, exif=exif)
    assert open_image(path).size == (5, 7)


def test_open_image__names_sample_and_path_of_a_missing_file() -> None:
    with pytest.raises(
        ImageError, match=r"Sample 'a1': image '/nowhere/x.png' does not exist\.\n  Check"
    ) as caught:
        open_image("/nowhere/x.png", sample_id="a1")
    assert isinstance(caught.value, UsageError)
    assert str(caught.value).count("\n") == 1


def test_open_image__refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder, not a file"):
        open_image(tmp_path)


def test_open_image__refuses_what_is_not_a_whole_image(jpeg: Path, tmp_path: Path) -> None:
    page, half, empty = tmp_path / "page.png", tmp_path / "half.jpg", tmp_path / "empty.png"
    page.write_text("<html>404</html>")
    half.write_bytes(jpeg.read_bytes()[:-100])
    empty.write_bytes(b"")
    for path in (page, half, empty):
        with pytest.raises(
            ImageError, match=rf"Sample 'b2': image '.*{path.name}': not an image .* decode whole"
        ):
            open_image(path, sample_id="b2")


@pytest.mark.parametrize("cut", [20, 60, 100])
def test_open_image__refuses_a_png_that_stops(cut: int) -> None:
    encoded = encode_png(Image.fromarray(PIXELS))
    with pytest.raises(ImageError, match=f"image {cut} bytes: not an image"):
        open_image(encoded[:cut])


def test_dataset__imports_without_torch() -> None:
    code = (
        "import sys, mechanistic.capture.dataset, mechanistic.capture.shapes;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
