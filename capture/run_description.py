"""What a run says about itself, and the groups it starts with."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechanistic.store import GroupSchema
from mechanistic.store.errors import UsageError
from mechanistic.store.schema import image_groups, sample_columns, token_columns

from .dataset import Dataset
from .models import LoadedModel
from .prompts import template_of
from .proof import Proof
from .residual import require_halves
from .sites import ResolvedSite
from .specification import INNER_SITES, ROW_SITES, SiteSpec
from .survey import Survey

SCORING = "the one option that the answer is, or mentions as whole words; else incorrect"


@dataclass(frozen=True)
class CaptureSettings:
    """Everything that decides what a run holds, beside model and dataset; kept in its attribute `capture`."""

    sites: tuple[SiteSpec, ...]
    batch_size: int = 8
    max_new_tokens: int = 8
    images: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 0:
            raise UsageError(
                f"batch_size={self.batch_size}, max_new_tokens={self.max_new_tokens}.",
                "A batch has at least 1 sample; answers have 0 tokens or more.",
            )

    def to_dict(self) -> dict[str, Any]:
        """The run's attribute `capture`."""
        return {
            "sites": [site.to_string() for site in self.sites],
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "images": self.images,
            "seed": self.seed,
            "decoding": "greedy",
            "scoring": SCORING,
        }


def dataset_attributes(dataset: Dataset) -> dict[str, Any]:
    """The run's attribute `dataset`, as far as the model has no part in it."""
    return {"name": dataset.name, "hash": dataset.fingerprint(), "num_samples": len(dataset)}


def run_attributes(
    loaded: LoadedModel, dataset: Dataset, settings: CaptureSettings, proof: Proof
) -> dict[str, Any]:
    """The root attributes of a run."""
    template = template_of(loaded.processor)
    return {
        "model": loaded.attributes(),
        "processor": loaded.processor_attributes(),
        "dataset": {
            **dataset_attributes(dataset),
            "prompt_template": "the processor's chat template" if template else "images, then the question",
        },
        "capture": settings.to_dict(),
        "proven": dict(proof.attributes),
        "software": software(),
        "licence": str(getattr(dataset, "licence", "")),
    }


def software() -> dict[str, str]:
    """Versions of what computes and writes a run."""
    import torch
    import transformers
    import zarr

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zarr": zarr.__version__,
        "numpy": np.__version__,
    }


def run_groups(
    sites: Sequence[ResolvedSite], survey: Survey, settings: CaptureSettings, proof: Proof
) -> list[GroupSchema]:
    """Every growing group of the run. ModelError for a site inside layers that have no such inside."""
    option = {"option": np.arange(survey.options, dtype=np.int32)}
    groups = [
        GroupSchema("samples", "sample", sample_columns(survey.options, survey.columns), coords=option),
        GroupSchema("tokens/text", "token", token_columns("token"), {"stack": "text"}),
    ]
    if survey.has_images:
        groups += image_groups(settings.images)
        groups.append(GroupSchema("tokens/vision", "patch", token_columns("patch"), {"stack": "vision"}))
        if "qformer" in proof.stacks:
            groups.append(
                GroupSchema("tokens/qformer", "token", token_columns("token"), {"stack": "qformer"})
            )
    return [*groups, *(schema for site in sites for schema in site.schemas(_described(site, proof)))]


def _described(site: ResolvedSite, proof: Proof) -> dict[str, Any]:
    stack = proof.stacks.get(site.attention or site.stack.name)
    if stack is None:
        return {}
    if site.spec.site in ("q", "k", "xq", "xk", *ROW_SITES):
        rules = {str(layer): stack.attention[str(layer)] for layer in site.layers}
        return {"attention": rules, "heads_per_kv_head": site.stack.heads // site.stack.kv_heads}
    if site.spec.site not in INNER_SITES:
        return {}
    require_halves(site.stack.name, site.spec.site, stack.halves)
    assert stack.halves is not None
    return {"definition": stack.halves.define(site.layers)[site.spec.site]}
