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

from mechanistic.store.errors import CaptureError

from .models import LoadedModel
from .readout import build_readout
from .vllm_engine import Engine
from .vllm_projection import linear

# What is cut over the processes of an engine by words.
_CUT = ("tokens", "unembed", "unembed_bias")


def engine_readout(
    engine: Engine, loaded: LoadedModel, words: Mapping[int, str]
) -> tuple[xr.Dataset, dict[str, Any]] | None:
    """What `build_readout` returns; each process of the engine gives the rows that it owns.

    Raises
    ------
    CaptureError    some word is no row of any process.
    """
    from safetensors.torch import load_file

    norm = loaded.anatomy.final_norm
    tokens = sorted(words)
    if norm is None or not tokens or not all(engine.call("mechanistic_readout", engine.folder.name, tokens)):
        return None
    files = sorted(Path(engine.folder.name).glob("readout*.safetensors"))
    parts = [load_file(file) for file in files]
    for file in files:
        file.unlink()
    held = {
        **parts[0],
        **{name: torch.cat([part[name] for part in parts]) for name in _CUT if name in parts[0]},
    }
    order = held["tokens"].argsort()
    if held["tokens"][order].tolist() != tokens:
        raise CaptureError(
            f"The engine's processes own {len(order)} of the {len(tokens)} words of the answers.",
            "Report the vLLM version and the model.",
        )
    held |= {name: held[name][order] for name in _CUT if name in held}
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
