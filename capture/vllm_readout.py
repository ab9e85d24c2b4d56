"""The readout of a model whose weights are in an engine: its final norm, and the rows of the answer words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .models import LoadedModel
from .readout import build_readout
from .vllm_engine import Engine
from .vllm_projection import linear


def engine_readout(
    engine: Engine, loaded: LoadedModel, words: Mapping[int, str]
) -> tuple[xr.Dataset, dict[str, Any]] | None:
    """What `build_readout` returns; None also where the unembedding is cut over processes."""
    from safetensors.torch import load_file

    norm = loaded.anatomy.final_norm
    tokens = sorted(words)
    if norm is None or not tokens or not engine.call("mechanistic_readout", engine.folder.name, tokens)[0]:
        return None
    file = Path(engine.folder.name) / "readout0.safetensors"
    held = load_file(file)
    file.unlink()
    anatomy = replace(
        loaded.anatomy,
        final_norm=with_weights(norm, held),
        unembedding=linear(held["unembed"], held.get("unembed_bias")),
    )
    # Its rows are those of the words alone, so the words are numbered as the rows are.
    built = build_readout(anatomy, loaded.model, {row: words[token] for row, token in enumerate(tokens)})
    if built is None:
        return None
    readout, attrs = built
    return readout.assign_coords(word_token_id=("word", np.array(tokens, np.int32))), attrs


def with_weights(norm: nn.Module, held: Mapping[str, Tensor]) -> nn.Module:
    """A norm like one without weights, with those of the engine."""
    filled = copy.deepcopy(norm).to_empty(device="cpu")
    with torch.no_grad():
        for name, key in (("weight", "norm"), ("bias", "norm_bias")):
            parameter = getattr(filled, name, None)
            if isinstance(parameter, Tensor):
                parameter.copy_(held[key])
    return filled
