"""What an image encoder gave for samples, put in its place where forwards need the images again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechanistic.store.errors import CaptureError

from .models import LoadedModel
from .resumed_forward import replaced_forward


@dataclass(frozen=True)
class KnownImages:
    """An encoder's output for the images of one sample: its class, and its tensors (token, ...) by name."""

    kind: type[Any]
    values: Mapping[str, Any]


def known_images(loaded: LoadedModel, forward: Callable[[], object]) -> KnownImages:
    """What the encoder gives in `forward`, of one sample.

    Raises
    ------
    CaptureError    the encoder does not run once in it.
    """
    found: list[KnownImages] = []
    # Its fields are copied: the library puts others into the output itself.
    handle = _encoder(loaded).register_forward_hook(
        lambda _, args, output: found.append(KnownImages(type(output), dict(output)))
    )
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    if len(found) != 1:
        raise CaptureError(
            f"The image encoder of {loaded.name} ran {len(found)} times in a forward.",
            "What it gives cannot be kept; report this model.",
        )
    return found[0]


@contextmanager
def given_images(loaded: LoadedModel, samples: Sequence[KnownImages]) -> Iterator[None]:
    """Forwards inside the block, of these samples, get what the encoder gave for each, and do not run it."""
    values = {name: _end_to_end([each.values[name] for each in samples]) for name in samples[0].values}
    with replaced_forward(_encoder(loaded), lambda *args, **kwargs: samples[0].kind(**values)):
        yield


def _encoder(loaded: LoadedModel) -> Any:
    return loaded.model.get_encoder(modality="image")


def _end_to_end(values: Sequence[Any]) -> Any:
    """The tokens of all samples; of lists of tensors, one by one."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [_end_to_end(each) for each in zip(*values, strict=True)]
