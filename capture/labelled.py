"""A batch as far as it is labelled: what the labels of further tokens are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dataset import Sample
from .prompts import Inputs, Prompt
from .token_table import Columns

# Labels of each sample, by table: ``qformer``, ``xq``, ``xk``.
Tables = Mapping[str, list[Columns]]


@dataclass(frozen=True)
class Labelled:
    """Samples with the model's inputs, and the labels of the decoder's and the encoder's tokens."""

    samples: Sequence[Sample]
    prompts: Sequence[Prompt]
    inputs: Inputs
    decoder: Sequence[Columns]
    encoder: Sequence[Columns]


def with_first_query(columns: Columns, first_query: NDArray[Any]) -> Columns:
    """Labels of keys that another stack reads: `first_query` is the position of the first that may.

    Their `position` is their place among the keys of the sample.
    """
    position = np.arange(len(first_query), dtype=np.int32)
    return {**columns, "position": position, "first_query": first_query.astype(np.int32)}
