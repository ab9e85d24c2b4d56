"""What a dataset is here: samples of a question about images, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from mechanistic.store.errors import DatasetError

Scalar = str | int | float | bool


class ImageError(DatasetError):
    """An image is missing, or is not an image."""


@dataclass(frozen=True)
class LoadedImage:
    """Pixels as the processor gets them (RGB, upright), and the encoded file that they came from."""

    pixels: Image.Image
    encoded: bytes
    sha256: str

    @property
    def width(self) -> int:
        return self.pixels.width

    @property
    def height(self) -> int:
        return self.pixels.height


ImageSource = Path | str | bytes | Image.Image | LoadedImage


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    `options` are the permitted answers in the order in which they are shown; empty for a free answer.
    `group` names the minimal-pair set: samples of one group must never be split over train and test.
    Each key of `extra` becomes a column of the run's samples table: all samples of a dataset have the same.

    Raises
    ------
    DatasetError    the id is empty, an option is there twice, or the answer is not among the options.
    """

    sample_id: str
    images: tuple[ImageSource, ...]
    question: str
    options: tuple[str, ...] = ()
    answer: str | None = None
    relation: str = ""
    subject: str = ""
    object: str = ""
    group: str = ""
    extra: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sample_id:
            raise DatasetError(
                f"A sample has no sample_id; its question is {self.question!r}.",
                "Give every sample an id of its own: Sample(sample_id='0001', ...).",
            )
        if len(set(self.options)) != len(self.options):
            raise DatasetError(
                f"Sample {self.sample_id!r} has an option twice: {', '.join(self.options)}.",
                "Give every option once.",
            )
        if self.options and self.answer is not None and self.answer not in self.options:
            raise DatasetError(
                f"Sample {self.sample_id!r}: the answer {self.answer!r} is not one of its options.",
                f"Use one of {', '.join(self.options)}, or answer=None where it is not known.",
            )

    @property
    def answer_index(self) -> int:
        """Place of the answer among the options, -1 where there is none."""
        return self.options.index(self.answer) if self.options and self.answer is not None else -1


class Dataset(Protocol):
    """A sequence of samples that always come in the same order with the same content."""

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """Hash of everything that decides the samples; a run is resumed only where it is the same."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def load_image(source: ImageSource, *, sample_id: str = "") -> LoadedImage:
    """Decode an image and keep the bytes that it was decoded from.

    A path is read as it is; an image in memory is encoded as PNG; one that is loaded already stays so.

    Raises
    ------
    ImageError    the file is missing or unreadable, or its bytes are not a whole image.
    """
    if isinstance(source, LoadedImage):
        return source
    if isinstance(source, Image.Image):
        pixels = source.convert("RGB")
        encoded = encode_png(pixels)
    else:
        encoded = source if isinstance(source, bytes) else _read(source, sample_id)
        pixels = _decode(encoded, source, sample_id)
    return LoadedImage(pixels, encoded, hashlib.sha256(encoded).hexdigest())


def open_image(source: ImageSource, *, sample_id: str = "") -> Image.Image:
    """Only the pixels of `load_image`: RGB, upright. Raises ImageError like it."""
    return load_image(source, sample_id=sample_id).pixels


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file without metadata: the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, format="PNG")
    return buffer.getvalue()


def _read(source: Path | str, sample_id: str) -> bytes:
    path = Path(source)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        problem = "does not exist"
    except IsADirectoryError:
        problem = "is a folder, not a file"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise ImageError(
        f"{_of(sample_id)}image {str(source)!r} {problem}.",
        "Check the dataset's image folder: relative paths are read from the working directory, "
        f"here {str(Path.cwd())!r}.",
    )


def _decode(encoded: bytes, source: Path | str | bytes, sample_id: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's decoders report broken files through all of these.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        named = f"{len(encoded)} bytes" if isinstance(source, bytes) else repr(str(source))
        raise ImageError(
            f"{_of(sample_id)}image {named}: not an image that Pillow can decode whole.",
            "Replace the file (a download that stopped half way, a web page saved as .jpg?), "
            "or leave the sample out.",
        ) from error


def _of(sample_id: str) -> str:
    return f"Sample {sample_id!r}: " if sample_id else ""
