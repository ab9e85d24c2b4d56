"""The layers of the image encoder inside a worker of vLLM, and whose tokens come out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mechanistic.store.errors import CaptureError, ModelError, SpecificationError

from .anatomy import Stack, layer_lists
from .sites import ResolvedSite
from .vllm_layers import layer_of

# By family, the classes of encoder layers whose tokens were compared, one by one, with the model's own.
COMPARED: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("SiglipEncoderLayer",),
    "llava": ("CLIPEncoderLayer",),
    "qwen2_vl": ("Qwen2VisionBlock",),
    "qwen2_5_vl": ("Qwen2_5_VisionBlock",),
    "qwen3_vl": ("Qwen3_VisionBlock",),
}
_ELSEWHERE = "Capture vision sites with --backend transformers, into a run of their own."


@dataclass(frozen=True)
class EncoderLayer:
    """A layer of the image encoder; `attention` is vLLM's own, None where transformers' code attends."""

    number: int
    path: str
    layer: nn.Module
    attention: nn.Module | None

    def describe(self) -> dict[str, Any]:
        """JSON-like."""
        return {"number": self.number, "path": self.path, "class": type(self.layer).__name__}


def find_encoder_layers(model: nn.Module) -> list[EncoderLayer]:
    """The layers of the image encoder, in order; none where the model has no images.

    Raises
    ------
    ModelError    they are not one plain stack.
    """
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    modules = dict(model.named_modules())
    own = {name: module for name, module in modules.items() if isinstance(module, MMEncoderAttention)}
    found: list[EncoderLayer] = []
    for name, module in own.items():
        number, path = layer_of(name) or (-1, name)
        found.append(EncoderLayer(number, path, modules[path], module))
    inner: Any = getattr(model, "model", None)
    if not own and hasattr(inner, "get_encoder") and hasattr(inner.config, "vision_config"):
        for layers in layer_lists(inner.get_encoder(modality="image")).values():
            paths = {id(module): name for name, module in modules.items()}
            found += [EncoderLayer(at, paths[id(layer)], layer, None) for at, layer in enumerate(layers)]
    found.sort(key=lambda each: each.number)
    if [each.number for each in found] != list(range(len(found))):
        raise ModelError(
            f"The image encoder of the engine's {type(model).__name__} is not one stack of layers.",
            _ELSEWHERE,
        )
    return found


def encoded_images(runner: Any, scheduled: Any) -> list[tuple[str, int]]:
    """The images that a step encodes, in the engine's own order: request id, and which image of it.

    Raises
    ------
    CaptureError    the runner encodes others than the scheduler says, or something that is no image.
    """
    _, items, places = runner._batch_mm_inputs_from_scheduler(scheduled)
    found: list[tuple[str, int]] = []
    for (modality, _), (request, place) in zip(items, places, strict=True):
        offsets = [feature.mm_position.offset for feature in runner.requests[request].mm_features]
        if modality != "image" or offsets != sorted(set(offsets)):
            raise CaptureError(
                f"The engine encodes what is no image ({modality}), or images in no order.", _ELSEWHERE
            )
        found.append((request, offsets.index(place.offset)))
    told = [(name, at) for name, each in scheduled.scheduled_encoder_inputs.items() for at in each]
    if sorted(found) != sorted(told):
        raise CaptureError(
            f"The runner encodes the images {sorted(found)}, the scheduler says {sorted(told)}.",
            "Nothing of this batch was kept. Report the vLLM version and the settings of the engine.",
        )
    return found


def check_encoder(told: Mapping[str, Any], stack: Stack, family: str, sites: Sequence[ResolvedSite]) -> None:
    """SpecificationError with the reason where an engine's encoder cannot be captured with certainty.

    Parameters
    ----------
    told
        What a worker said of it: its layers, or a problem.
    """
    if told["problem"]:
        raise SpecificationError(
            f"Vision sites cannot be captured on this engine: {told['problem']}", _ELSEWHERE
        )
    classes = sorted({layer["class"] for layer in told["layers"]})
    if not set(classes) <= set(COMPARED.get(family, ())) or not classes:
        raise SpecificationError(
            f"Vision sites cannot be captured on this engine: in which order {' and '.join(classes) or 'it'} "
            f"sees the patches of a '{family}' was never compared with the model's own.",
            _ELSEWHERE,
        )
    # LLaVA takes its features from an early layer, and vLLM leaves those behind it out.
    wanted = {layer for site in sites for layer in site.layers}
    absent = sorted(wanted - set(range(len(told["layers"]))))
    if absent:
        raise SpecificationError(
            f"vision.{absent[0]} is not there on this engine: it runs {len(told['layers'])} of the "
            f"{len(stack.layers)} layers, since nothing reads the others.",
            f"Ask for vision.0-{len(told['layers']) - 1}, or capture it with --backend transformers.",
        )
