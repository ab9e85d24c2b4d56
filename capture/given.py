"""What an interactive call is given as a model and as questions, made into what the library works with."""

from __future__ import annotations

from typing import Any

from mechanistic.store.errors import UsageError

from .dataset import ImageSource, Sample
from .models import LoadedModel, load_model


def given_model(model: Any, processor: Any, call: str) -> LoadedModel:
    """A `LoadedModel` from one, from a name, or from a transformers model and its processor.

    Parameters
    ----------
    processor
        Absent, that of the folder or repository that the model came from.
    call
        How the user passes a processor, for the error that there is none.

    Raises
    ------
    UsageError    there is no processor.
    """
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str):
        return load_model(model)
    source = getattr(model, "name_or_path", "")
    if processor is None:
        try:
            import transformers

            library: Any = transformers
            processor = library.AutoProcessor.from_pretrained(source)
        # The library reports a repository or folder without a processor in many ways.
        except Exception as cause:
            raise UsageError(
                f"The processor of {type(model).__name__} is not where the model came from ({source!r}).",
                f"Pass it: {call}.",
            ) from cause
    return LoadedModel(model, processor, source or type(model).__name__)


def given_samples(samples: Any) -> tuple[Sample, ...]:
    """The samples of a sample, of several, of a dataset, or of a pair (image, text).

    Raises
    ------
    UsageError    it is none of these, or there is none.
    """
    if isinstance(samples, Sample):
        return (samples,)
    if isinstance(samples, tuple) and len(samples) == 2 and isinstance(samples[1], str):
        image, text = samples
        images = (image,) if isinstance(image, ImageSource) else tuple(image)
        return (Sample(sample_id="text", images=images, question=text),)
    several = (
        tuple(samples[place] for place in range(len(samples))) if hasattr(samples, "__getitem__") else ()
    )
    if not several or not all(isinstance(sample, Sample) for sample in several):
        raise UsageError(
            f"This is no question to ask a model: {type(samples).__name__}.",
            "Give a pair (image, text), a Sample, a list of samples or a dataset such as Shapes(8).",
        )
    return several
