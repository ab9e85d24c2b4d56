"""The images of the next batch, decoded in a thread of its own while the model works on this one."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from .dataset import ImageError, Sample, load_image


class ReadAhead:
    """Samples by number, with images that are loaded already; of two batches at most."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._now: dict[int, Future[Sample]] = {}
        self._next: dict[int, Future[Sample]] = {}

    def start(self, samples: Mapping[int, Sample]) -> None:
        """Read these; what the call before the last one read is let go of."""
        self._now, self._next = self._next, {}
        for number, sample in samples.items():
            self._next[number] = self._thread.submit(_read, sample)

    def sample(self, number: int, otherwise: Sample) -> Sample:
        """The sample as it was read, or `otherwise` where it was not."""
        reading = self._now.get(number)
        return otherwise if reading is None else reading.result()


def _read(sample: Sample) -> Sample:
    try:
        loaded = [load_image(source, sample_id=sample.sample_id) for source in sample.images]
    except ImageError:
        # Read again by its capture, which reports it with its place in the batch.
        return sample
    return replace(sample, images=tuple(loaded))
