"""What a patched forward is measured by: numbers of the logits at the last prompt token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import DataError

from .answers import option_tokens
from .batch import Batch
from .models import LoadedModel

# Units, and the difference of clean and corrupt below which there is nothing to recover.
PAIR_METRICS: Mapping[str, tuple[str, float]] = {
    "logit_diff": ("logit", 0.5),
    "prob": ("1", 0.05),
    "log_prob": ("nat", 0.5),
    "kl": ("nat", 0.05),
}


@dataclass(frozen=True)
class PairAnswers:
    """First tokens of the clean and the corrupt answer of each pair, and which of them stand for more."""

    clean: NDArray[np.int64]
    corrupt: NDArray[np.int64]
    note: str


def pair_answers(loaded: LoadedModel, pairs: Sequence[tuple[Batch, Batch]]) -> PairAnswers:
    """Find the tokens by which the answers of pairs (clean, corrupt) are told apart.

    Raises
    ------
    DataError    a sample has no answer, both have the same, or an answer's first token is not its own.
    """
    clean, corrupt, split = [], [], set()
    for first, second in pairs:
        sample, other = first.samples[0], second.samples[0]
        if sample.answer is None or other.answer is None or sample.answer == other.answer:
            raise DataError(
                f"The answers of samples {sample.sample_id!r} and {other.sample_id!r}, {sample.answer!r} and "
                f"{other.answer!r}, do not differ.",
                "Pair samples with different answers, or choose metric='kl', which needs none.",
            )
        words = list(dict.fromkeys([sample.answer, other.answer, *sample.options, *other.options]))
        found = option_tokens(loaded.tokenizer, first.prompts[0].text, words)
        if found.ids[0] is None or found.ids[1] is None:
            raise DataError(
                f"The tokenizer splits the answers of {sample.sample_id!r} so that their first tokens do not "
                f"tell them apart ({found.note}).",
                "Choose metric='kl', or options whose first tokens differ.",
            )
        clean.append(found.ids[0])
        corrupt.append(found.ids[1])
        split |= {word for word in words[:2] if _tokens(loaded, word) > 1}
    note = f"by first tokens, of several: {', '.join(sorted(split))}" if split else ""
    return PairAnswers(np.array(clean), np.array(corrupt), note)


def measure(metric: str, logits: Tensor, clean: Any, corrupt: Any, reference: Tensor | None) -> Tensor:
    """The metric of logits (row, word), float64.

    logit_diff: logit of the clean answer less that of the corrupt one; prob, log_prob: of the clean answer;
    kl: KL(reference || patched) over the whole vocabulary, with the clean run as reference, zero where the
    two agree.
    """
    logits = logits.double()
    rows = torch.arange(len(logits), device=logits.device)
    if metric == "logit_diff":
        found = [torch.as_tensor(each, device=logits.device) for each in (clean, corrupt)]
        return logits[rows, found[0]] - logits[rows, found[1]]
    logs = logits.log_softmax(-1)
    if metric == "kl":
        assert reference is not None
        wanted = reference.to(logits.device).double().log_softmax(-1)
        return (wanted.exp() * (wanted - logs)).sum(-1)
    chosen = logs[rows, torch.as_tensor(clean, device=logits.device)]
    return chosen if metric == "log_prob" else chosen.exp()


def _tokens(loaded: LoadedModel, word: str) -> int:
    return len(loaded.tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
