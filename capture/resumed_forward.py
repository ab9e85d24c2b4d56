"""A decoder's forward that starts at one of its layers, from hidden states that are known already.

The layers below it pass on what they get, the image tower is left out, and the given states go into the
layer. Masks, rotary positions, what comes between layers and what follows them are made by the model's own
code, which sees its usual call. Only logits of the last prompt tokens are computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mechanistic.store.errors import CaptureError, ModelError, SpecificationError

from .answers import pad_id, to_device
from .forward import takes
from .interventions import with_input
from .models import LoadedModel
from .prompts import Inputs, is_token_like
from .residual import first_tensor, hidden_input

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


@dataclass(frozen=True)
class ResumedForward:
    """How a model's decoder is started in its middle; made and proven by `prove_resumed_forward`.

    `image_layers`: image features still enter the stream at the inputs of layers up to this one (Qwen3-VL's
    deep-stack), so that a forward that starts below needs the images. `reads_images`: all do, because layers
    attend to the images themselves, or the model takes no call without. `tuples`: layers return tuples.
    `error`: by how much the logits of a resumed forward missed those of a plain one, as a share of the
    largest, at each layer.
    """

    loaded: LoadedModel
    image_layers: int
    tuples: bool
    error: tuple[float, ...] = ()
    reads_images: bool = False

    def needs_images(self, layer: int) -> bool:
        """Whether a forward from this layer on sees the images."""
        return self.reads_images or layer < self.image_layers

    def logits(self, inputs: Inputs, last: Tensor, layer: int, hidden: Tensor) -> Tensor:
        """Logits (sample, word), float32, at each sample's last prompt token; autograd as the caller set it.

        Parameters
        ----------
        inputs
            Those of the whole model, padded on the right; see `joined_inputs`.
        last
            The position of the last prompt token of each sample.
        layer
            Where to start; as many as there are layers: with the final norm.
        hidden
            (sample, token, d_model): what goes into that layer.
        """
        layers = self.loaded.anatomy.stack("text").layers
        if not 0 <= layer <= len(layers):
            raise SpecificationError(
                f"There is no layer {layer} to start at: the decoder has {len(layers)}.",
                f"Choose from 0 to {len(layers)}, the final norm.",
            )
        if hidden.shape[:2] != inputs["input_ids"].shape:
            raise CaptureError(
                f"Hidden states of {tuple(hidden.shape[:2])} tokens do not fit inputs of "
                f"{tuple(inputs['input_ids'].shape)}.",
                "Give one row for each token of the padded batch.",
            )
        if not self.needs_images(layer):
            inputs = without_pixels(inputs)
        with self._started(layers, layer, hidden):
            return plain_logits(self.loaded, inputs, last)

    @contextmanager
    def _started(self, layers: Sequence[nn.Module], layer: int, hidden: Tensor) -> Iterator[None]:
        with ExitStack() as active:
            for below in layers[:layer]:
                active.enter_context(replaced_forward(below, self._pass))
            # Behind the last layer, the last one passes on what it is given.
            first = layers[min(layer, len(layers) - 1)]

            def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
                had = hidden_input(args, kwargs)
                return with_input(args, kwargs, hidden.to(had.device, had.dtype))

            active.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        return (hidden,) if self.tuples else hidden


def prove_resumed_forward(loaded: LoadedModel, inputs: Inputs, last: Tensor) -> ResumedForward:
    """Find out how to resume a model, and check at every layer that its logits are those of a plain forward.

    Raises
    ------
    CaptureError    at some layer they are not.
    """
    layers = loaded.anatomy.stack("text").layers
    entered: list[Tensor] = []
    left: list[Any] = []
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.callback(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: entered.append(hidden_input(args, kwargs).detach()),
                    with_kwargs=True,
                ).remove
            )
            hooks.callback(layer.register_forward_hook(lambda _, args, output: left.append(output)).remove)
        plain = plain_logits(loaded, inputs, last)
    pieces = enumerate(pairwise(range(len(layers))))
    broken = [
        number + 1
        for number, (lower, upper) in pieces
        if not torch.equal(first_tensor(left[lower]), entered[upper].to(first_tensor(left[lower]).device))
    ]
    tuples = not isinstance(left[0], Tensor)
    # What enters at that layer's input or below is in the states that a forward is resumed from there with.
    resumed = ResumedForward(loaded, max(broken, default=0), tuples, reads_images=_reads_images(loaded))
    states = [*entered, first_tensor(left[-1])]
    errors = []
    with torch.no_grad():
        for number, hidden in enumerate(states):
            got = resumed.logits(inputs, last, number, hidden)
            errors.append(float((got - plain).abs().max() / plain.abs().max().clamp_min(1e-30)))
    check_error(max(errors), loaded.dtype, f"{loaded.name}: a forward resumed in the middle")
    return replace(resumed, error=tuple(errors))


def _reads_images(loaded: LoadedModel) -> bool:
    """Whether a forward needs the images at whatever layer it starts."""
    parameters = inspect.signature(loaded.model.forward).parameters.values()
    insists = any(each.name.startswith("pixel_") and each.default is each.empty for each in parameters)
    return insists or bool(loaded.anatomy.stack("text").attending(cross=True))


def check_error(error: float, dtype: str, what: str) -> None:
    """CaptureError if logits miss by more than the model's dtype explains."""
    if error > TOLERANCE[dtype]:
        raise CaptureError(
            f"{what} misses the logits of the plain one by {error:.2g} of the largest "
            f"(allowed: {TOLERANCE[dtype]:.0e}).",
            "Report this model; with recompute=True and in float32 its states are its own, not stored ones.",
        )


def plain_logits(loaded: LoadedModel, inputs: Inputs, last: Tensor) -> Tensor:
    """Logits (sample, word), float32, of the model's own forward at the last prompt tokens.

    ModelError for a model that gives none of words.
    """
    model = loaded.model
    arguments: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    last = last.to(model.device)
    wanted, place = torch.unique(last, return_inverse=True)
    keep = takes(model, "logits_to_keep")
    if keep:
        # Logits of the whole vocabulary for every token would be the largest tensor by far.
        arguments["logits_to_keep"] = wanted
    logits: Tensor | None = getattr(model(**inputs, **arguments), "logits", None)
    if logits is None:
        raise ModelError(
            f"{type(model).__name__} gives no logits of words, so there is no answer to measure.",
            "Choose a model that writes text; gradcam explains how well a text and an image fit.",
        )
    rows = torch.arange(len(last), device=logits.device)
    return logits[rows, (place if keep else last).to(logits.device)].float()


def without_pixels(inputs: Inputs) -> Inputs:
    """The inputs without the images themselves; their sizes and grids stay, which positions are made of."""
    return {name: value for name, value in inputs.items() if not name.startswith("pixel_")}


def joined_inputs(
    loaded: LoadedModel, samples: Sequence[Inputs], *, images: bool = True
) -> tuple[Inputs, Tensor]:
    """One batch of the inputs of single samples, padded on the right, and where their last tokens are.

    Parameters
    ----------
    images
        False leaves the images themselves out.

    Raises
    ------
    CaptureError    what is not along the tokens has another shape from sample to sample.
    """
    if not images:
        samples = [without_pixels(each) for each in samples]
    width = max(each["input_ids"].shape[1] for each in samples)
    fill = {"input_ids": pad_id(loaded.tokenizer)}
    joined: Inputs = {}
    for name in samples[0]:
        parts = [each[name] for each in samples]
        if is_token_like(samples[0], name):
            parts = [_padded(part, width, fill.get(name, 0)) for part in parts]
        if len({part.shape[1:] for part in parts}) > 1:
            raise CaptureError(
                f"The samples' {name} have shapes {sorted({tuple(part.shape[1:]) for part in parts})}.",
                "They cannot be asked together: use batch_size=1.",
            )
        joined[name] = torch.cat(parts)
    last = torch.tensor([each["input_ids"].shape[1] - 1 for each in samples])
    return to_device(joined, loaded.model), last


def _padded(part: Tensor, width: int, fill: int) -> Tensor:
    wide = part.new_full((part.shape[0], width, *part.shape[2:]), fill)
    wide[:, : part.shape[1]] = part
    return wide


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another forward of one module, for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
