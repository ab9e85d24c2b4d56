"""Which samples share a forward: a function of dataset and specification, never of where a job resumed."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby

from PIL import Image

from .dataset import ImageSource, LoadedImage, Sample

# Rows wait in memory for the samples before them: a job holds those of one window, and of another that is
# being written. A batch that is larger by itself is a window of its own.
WINDOW_BATCHES = 4
WINDOW_BYTES = 256 << 20


def windows(numbers: range, batch_size: int, sample_bytes: float) -> Iterator[list[int]]:
    """Consecutive samples, as many batches at a time as the rows of such samples let wait in memory."""
    fitting = int(WINDOW_BYTES / max(1.0, sample_bytes * batch_size))
    step = max(1, min(WINDOW_BATCHES, fitting)) * batch_size
    for first in range(numbers.start, numbers.stop, step):
        yield list(range(first, min(first + step, numbers.stop)))


def batches(window: Mapping[int, Sample], batch_size: int, *, equal_images: bool = False) -> list[list[int]]:
    """The samples of a window, by number, in batches of similar length, so that little is padded.

    With `equal_images` the samples of a batch have equally many images.
    """
    order = sorted(window, key=lambda number: (*expected_length(window[number]), number))
    alike = groupby(order, lambda number: len(window[number].images) if equal_images else 0)
    return [
        sorted(group[first : first + batch_size])
        for group in (list(members) for _, members in alike)
        for first in range(0, len(group), batch_size)
    ]


def committable(plan: Sequence[Sequence[int]], done: Collection[int]) -> list[int]:
    """The longest beginning of a window that is whole batches of it, all `done`.

    A run that stops there computes nothing of it again, and no batch differs from an uninterrupted run's.
    """
    numbers = sorted(number for batch in plan for number in batch)
    ready = {number for batch in plan if all(each in done for each in batch) for number in batch}
    whole = 0
    for count, number in enumerate(numbers, 1):
        if number not in ready:
            break
        if all((batch[0] <= number) == (batch[-1] <= number) for batch in plan):
            whole = count
    return numbers[:whole]


def expected_length(sample: Sample) -> tuple[int, int, int]:
    """Number of images, their pixels, and characters of the question: what decides how long a prompt is."""
    return len(sample.images), sum(_area(source) for source in sample.images), len(sample.question)


def _area(source: ImageSource) -> int:
    """Pixels of an image from its header; 0 where it cannot be read, which its capture will report."""
    if isinstance(source, Image.Image | LoadedImage):
        return source.width * source.height
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.width * image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0
