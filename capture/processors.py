"""Loading a model's processor, on machines without torchvision too.

Processors that also take videos want a video processor, which needs torchvision; images alone do not.
"""

from __future__ import annotations

import sys
from typing import Any


def load_processor(source: str, config: Any, **hub: Any) -> Any:
    """The processor of a model folder or hub id; where torchvision is missing, without its video half."""
    import transformers
    from transformers.models.auto import processing_auto

    library: Any = transformers
    names: Any = processing_auto
    name = names.PROCESSOR_MAPPING_NAMES.get(config.model_type)
    complete = library.utils.is_torchvision_available()
    base = getattr(library, name, None) if isinstance(name, str) and not complete else None
    if base is None or "video_processor" not in base.get_attributes():
        return library.AutoProcessor.from_pretrained(source, **hub)
    return without_video(base).from_pretrained(source, **hub)


def without_video(base: Any) -> Any:
    """A processor class that is like `base` but neither loads nor needs a video processor."""
    from transformers.processing_utils import ProcessorMixin

    # SmolVLM's spells out how many frames a video has, and refuses to start without the package for it.
    module: Any = sys.modules[base.__module__]
    if getattr(module, "num2words", str) is None:
        module.num2words = str

    class WithoutVideo(base):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **settings: Any) -> list[Any]:
            # All of these processors take image_processor, tokenizer, video_processor, in this order.
            return [*super()._get_arguments_from_pretrained(*args, **settings), None]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None and argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        # SmolVLM's own asks its video processor how many frames there are.
        apply_chat_template = ProcessorMixin.apply_chat_template

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = base.__name__
    return WithoutVideo
