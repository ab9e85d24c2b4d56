"""Where things are in a model: its stacks of layers, their head counts, the final norm and the unembedding.

Found from the tree of modules and its configurations alone, so that it costs no forward and works on the meta
device. What it says about shapes is proven by the forward at attach (proof.py).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from mechanistic.store.errors import ModelError

from .adapters import adapter_of

# Behind the name of a stack: its cross-attention, whose keys are the tokens of another stack.
CROSS = "/x"


@dataclass(frozen=True)
class Stack:
    """A run of layers of one kind. Layer numbers count from 0 in forward order."""

    name: str
    path: str
    layers: tuple[nn.Module, ...]
    width: int
    heads: int
    kv_heads: int
    head_width: int
    sequence: tuple[str, ...]

    @property
    def is_encoder(self) -> bool:
        """Whether its tokens come image by image, and not sample by sample."""
        return self.name.startswith("vision")

    @property
    def axis(self) -> str:
        """The token dimension of this stack in a run."""
        return "patch" if self.is_encoder else "token"

    @cached_property
    def dtype(self) -> str | None:
        """What the layers compute in, where all of their parameters agree (Q-Formers stay in float32)."""
        parameters = (parameter for layer in self.layers for parameter in layer.parameters())
        found = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
        return str(found.pop()).removeprefix("torch.") if len(found) == 1 else None

    def module_layers(self, *, cross: bool) -> dict[nn.Module, int]:
        """The layer number of every module inside a layer: those of its cross-attention, or the others."""
        return {
            module: number
            for number, layer in enumerate(self.layers)
            for path, module in layer.named_modules()
            if ("cross" in path) == cross
        }

    def attending(self, *, cross: bool) -> tuple[int, ...]:
        """The layers that attend to the tokens of another stack, or to their own."""
        inside = self.module_layers(cross=cross).items()
        attention = {
            number for part, number in inside if is_attention(part) and part is not self.layers[number]
        }
        return tuple(sorted(attention))


@dataclass(frozen=True)
class Anatomy:
    """The stacks of a model by name, and what turns the decoder's last residual into logits.

    `positions` is how many words may stand in a row, in a model that learned a vector for each place.
    """

    stacks: Mapping[str, Stack]
    final_norm: nn.Module | None
    unembedding: nn.Module | None
    image_token_id: int | None
    positions: int | None = None

    def module_layers(self, names: Collection[str]) -> dict[nn.Module, tuple[str, int]]:
        """Name and layer number of every module of the named attentions, such as ``text`` and ``text/x``."""
        return {
            module: (name, layer)
            for name in names
            for module, layer in self.of(name).module_layers(cross=name.endswith(CROSS)).items()
        }

    def of(self, name: str) -> Stack:
        """The stack whose attention is called `name`."""
        return self.stack(name.removesuffix(CROSS))

    def stack(self, name: str) -> Stack:
        """The stack called `name`. ModelError names those that the model has."""
        if name not in self.stacks:
            raise ModelError(
                f"This model has no {name} stack.",
                f"It has: {', '.join(self.stacks)}. Choose sites of those.",
            )
        return self.stacks[name]


def find_anatomy(model: Any) -> Anatomy:
    """Find the stacks of a transformers model.

    Raises
    ------
    ModelError    something could not be established; the message lists all of it.
    """
    unknown: list[str] = []
    roots = _stack_roots(model)
    stacks: dict[str, Stack] = {}
    for name, root in roots.items():
        stack = _find_stack(model, name, root, unknown)
        if stack is not None:
            stacks[name] = stack
    if not roots:
        unknown.append("neither a text decoder nor an image encoder")
    decoder = roots.get("text")
    norm = _final_norm(decoder, stacks["text"]) if decoder is not None and "text" in stacks else None
    unembedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    two_parts = hasattr(model, "text_encoder") and hasattr(model, "text_decoder")
    if two_parts or getattr(model.config.get_text_config(), "is_encoder_decoder", False):
        unknown.append("how prompt and answer divide over its text encoder and decoder")
    image_token = image_token_id(model)
    # Two towers side by side, such as CLIP's, have no images among their words.
    if len(roots) > 1 and image_token is None and model.can_generate() and adapter_of(model).marks:
        unknown.append("the id of the image token (config.image_token_id)")
    if unknown:
        unknown += [
            f"the attention of the {name} stack, which is code of its own"
            for name, stack in stacks.items()
            if _is_own(stack)
        ]
        raise ModelError(
            f"{type(model).__name__}: could not establish {'; '.join(unknown)}.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    return Anatomy(stacks, norm, unembedding, image_token, _learned_positions(model, decoder))


def image_token_id(model: Any) -> int | None:
    """The id of the placeholder that image features replace, from the configuration."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None


def _learned_positions(model: Any, decoder: nn.Module | None) -> int | None:
    """Rows of the table of positions; OPT's has two more, which it never reads."""
    if decoder is None:
        return None
    config = model.config.get_text_config()
    words = _first(config, "vocab_size")
    positions = _first(config, "max_position_embeddings", "n_positions")
    rows = {part.num_embeddings for part in decoder.modules() if isinstance(part, nn.Embedding)} - {words}
    known = positions is not None and not rows.isdisjoint({positions, positions + 2})
    return positions if known else None


def module_path(model: nn.Module, module: nn.Module) -> str:
    """The dotted path of `module` inside `model`."""
    paths: dict[nn.Module, str] = {candidate: name for name, candidate in model.named_modules()}
    return paths[module]


def _stack_roots(model: Any) -> dict[str, nn.Module]:
    adapted = adapter_of(model).roots
    if adapted is not None:
        return {name: model.get_submodule(path) for name, path in adapted.items()}
    bases: tuple[Any, ...] = (model, getattr(model, "base_model", None))
    only_images = tuple(getattr(model, "input_modalities", ())) == ("image",) or (
        getattr(model, "main_input_name", "") == "pixel_values" and not hasattr(model.config, "text_config")
    )
    if only_images:
        return {"vision": model}
    roots = {"text": model.get_decoder()}
    encoder = model.get_encoder(modality="image")
    if not any(encoder is base for base in bases) and encoder is not roots["text"]:
        roots["vision"] = encoder
    return roots


def _find_stack(model: nn.Module, name: str, root: nn.Module, unknown: list[str]) -> Stack | None:
    lists = layer_lists(root)
    if len(lists) != 1:
        what = "no list of layers" if not lists else f"{len(lists)} lists of layers ({', '.join(lists)})"
        unknown.append(
            f"the {name} stack: {what} with attention under {module_path(model, root) or 'the model'}"
        )
        return None
    inner, layers = next(iter(lists.items()))
    path = ".".join(part for part in (module_path(model, root), inner) if part)
    config: Any = getattr(root, "config", None)
    config = config.get_text_config() if name == "text" and hasattr(config, "get_text_config") else config
    # Qwen2-VL's encoder calls the decoder's width its hidden_size.
    width = _first(config, "embed_dim", "hidden_size", "n_embd", "d_model")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "attention_heads")
    if width is None or heads is None:
        unknown.append(f"the width and number of heads of the {name} stack")
        return None
    attention = next(module for module in layers[0].modules() if is_attention(module))
    head_width = _first(config, "head_dim") or _first(attention, "head_dim") or width // heads
    kv_heads = _first(config, "num_key_value_heads") or heads
    sequence = adapter_of(model).sequence
    return Stack(name, path, tuple(layers), width, heads, kv_heads, head_width, sequence)


def _is_own(stack: Stack) -> bool:
    """Whether attention is computed by code of its own, beside the library's table of attention functions."""
    inside = stack.module_layers(cross=False) | stack.module_layers(cross=True)
    sources = {type(part).__module__ for part in inside if is_attention(part)}
    return not any(hasattr(sys.modules[source], "ALL_ATTENTION_FUNCTIONS") for source in sources)


def layer_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    """ModuleLists whose members attend, the outermost ones only."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(is_attention(part) for part in module[0].modules()):
            found[name] = module
    return found


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention by its class's name, which every architecture keeps to."""
    return "attention" in type(module).__name__.lower()


def _final_norm(decoder: nn.Module, stack: Stack) -> nn.Module | None:
    """The one norm that is a direct child of the module that holds the layers."""
    holders = [
        module for module in decoder.modules() if any(child is stack.layers[0] for child in _members(module))
    ]
    if len(holders) != 1:
        return None
    norms = [child for child in holders[0].children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def _members(module: nn.Module) -> list[nn.Module]:
    return [part for child in module.children() if isinstance(child, nn.ModuleList) for part in child]


def _first(source: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(source, name, None), int)), None)
