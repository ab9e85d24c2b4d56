"""What the logit lens needs, so that it runs without the model: the final norm and some unembedding rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .anatomy import Anatomy
from .output_projection import OutputProjection

if TYPE_CHECKING:
    from .proof import StackProof
    from .sites import ResolvedSite

# Of more words and heads than this they are left out, which the group's attributes say.
_HEADS_BYTES = 256 << 20


def build_readout(
    anatomy: Anatomy, model: Any, words: Mapping[int, str]
) -> tuple[xr.Dataset, dict[str, Any]] | None:
    """The final norm and the unembedding rows of `words` (token id -> text).

    What the norm computes is established by running it, not by its class's name. None where the model has no
    unembedding, or a norm that is neither RMS nor layer norm.

    Returns
    -------
    Dataset
        final_norm_weight (d_model), final_norm_bias (d_model) where there is one, unembed (word, d_model),
        unembed_bias (word) where there is one, and the labels word and word_token_id.
    attributes
        norm_kind, eps, weight_offset, softcap.
    """
    norm, unembedding = anatomy.final_norm, anatomy.unembedding
    if norm is None or unembedding is None or not words:
        return None
    described = describe_norm(norm)
    if described is None:
        return None
    ids = torch.tensor(sorted(words))
    weight: Tensor = unembedding.weight  # type: ignore[assignment]
    variables: dict[str, Any] = {
        "final_norm_weight": ("d_model", _host(norm.weight)),
        "unembed": (("word", "d_model"), _host(weight[ids.to(weight.device)])),
    }
    if getattr(norm, "bias", None) is not None:
        variables["final_norm_bias"] = ("d_model", _host(norm.bias))
    if getattr(unembedding, "bias", None) is not None:
        variables["unembed_bias"] = ("word", _host(unembedding.bias)[ids.numpy()])
    coords = {
        "word": ("word", np.array([words[int(token)] for token in ids], object)),
        "word_token_id": ("word", ids.numpy().astype(np.int32)),
    }
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return xr.Dataset(variables, coords), {**described, "softcap": softcap}


def with_heads(
    readout: xr.Dataset, attrs: dict[str, Any], sites: Sequence[ResolvedSite], proof: StackProof
) -> tuple[xr.Dataset, dict[str, Any]]:
    """The readout with that of each captured head; `no_head_readout` says why there is none."""
    found = [site for site in sites if site.group == "text/z"]
    if not found:
        return readout, attrs
    (site,) = found
    assert site.heads is not None
    heads: xr.Dataset | str = proof.projection_problem or head_readout(
        readout, attrs, proof.projections, site.layers, site.heads, site.stack.head_width
    )
    if isinstance(heads, str):
        return readout, {**attrs, "no_head_readout": heads}
    return readout.merge(heads), attrs


def head_readout(
    readout: xr.Dataset,
    attrs: Mapping[str, Any],
    projections: Mapping[int, OutputProjection],
    layers: Sequence[int],
    heads: Sequence[int],
    head_width: int,
) -> xr.Dataset | str:
    """What each head's output is worth in the answer words' logits, before the final norm's scale.

    head_readout[l, h, e, w] = sum_d g[w, d] W_O[l][d, h x head_width + e], with g the rows of unembed times
    the final norm's weight, less their mean over d for layer norm.

    Returns
    -------
    head_readout (layer, head, d_head, word), float32; attn_bias_readout (layer, word), float32, the same of
        the projection's bias, 0 without one. Or why there is none: the sentence that the run keeps.
    """
    size = 4 * len(layers) * len(heads) * head_width * readout.sizes["word"]
    if size > _HEADS_BYTES:
        return f"{readout.sizes['word']} words would take {size >> 20} MiB; {_HEADS_BYTES >> 20} are written"
    weight = readout["final_norm_weight"].values + np.float32(attrs["weight_offset"])
    rows = torch.from_numpy(readout["unembed"].values * weight)
    if attrs["norm_kind"] == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    values = np.empty((len(layers), len(heads), head_width, len(rows)), np.float32)
    biases = np.zeros((len(layers), len(rows)), np.float32)
    for place, layer in enumerate(layers):
        projection = projections[layer]
        there = rows.to(projection.weight.device)
        worth = (there @ projection.weight.float()).unflatten(-1, (-1, head_width))
        values[place] = worth[:, list(heads)].permute(1, 2, 0).cpu().numpy()
        if projection.bias is not None:
            biases[place] = (there @ projection.bias.float()).cpu().numpy()
    return xr.Dataset(
        {
            "head_readout": (("layer", "head", "d_head", "word"), values),
            "attn_bias_readout": (("layer", "word"), biases),
        },
        {
            "layer": ("layer", np.asarray(layers, np.int32)),
            "head": ("head", np.asarray(heads, np.int32)),
        },
    )


def describe_norm(norm: nn.Module) -> dict[str, Any] | None:
    """`norm_kind`, `eps` and `weight_offset` of a norm, by comparing it with each formula on random input."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(norm, "bias", None)
    eps = next(
        (float(getattr(norm, name)) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), 0.0
    )
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, weight.shape[0], generator=generator).to(weight)
    with torch.no_grad():
        expected = norm(values).float()
    for kind in ("rms", "layer"):
        for offset in (0.0, 1.0):
            got = apply_norm(values.float(), kind, eps, weight.float() + offset)
            if bias is not None:
                got = got + bias.float()
            if bool(
                torch.allclose(got, expected, rtol=2e-2 if weight.dtype != torch.float32 else 1e-4, atol=1e-5)
            ):
                return {"norm_kind": kind, "eps": eps, "weight_offset": offset}
    return None


def apply_norm(values: Tensor, kind: str, eps: float, weight: Tensor) -> Tensor:
    """RMS norm or layer norm of the last axis, times `weight`."""
    centred = values - values.mean(-1, keepdim=True) if kind == "layer" else values
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight


def _host(value: Any) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = value.detach().float().cpu().numpy()
    return result
