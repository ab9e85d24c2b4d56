"""The tokens by which a batch of questions is answered: the right one, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechanistic.store.errors import DataError

from .answers import option_tokens
from .batch import Batch
from .models import LoadedModel


@dataclass(frozen=True)
class AnswerTokens:
    """First tokens of what can be answered: `options` (sample, option), -1 where a sample has fewer.

    `right` (sample,) is the place of the right one; `foil` (sample,) that of the one it is compared with, -1
    for the mean of all others.
    """

    options: Tensor
    right: Tensor
    foil: Tensor

    def foil_weights(self) -> Tensor:
        """How much of each option's logit (sample, option) the right answer's is compared with; sums to 1."""
        place = torch.arange(self.options.shape[1], device=self.options.device)
        chosen = place == self.foil[:, None]
        others = (self.options >= 0) & (place != self.right[:, None])
        weights = torch.where(self.foil[:, None] < 0, others, chosen).float()
        return weights / weights.sum(1, keepdim=True)


def find_answer_tokens(
    loaded: LoadedModel, batch: Batch, foils: Sequence[str | None], *, compared: bool
) -> AnswerTokens:
    """The tokens of each sample's answers, `foils` among them; an answer has to be `compared` with another.

    Raises
    ------
    DataError    a sample has no answer, or nothing to compare it with, or an answer has no token of its own.
    """
    words, right, foil = [], [], []
    for row, sample in enumerate(batch.samples):
        if sample.answer is None:
            raise DataError(
                f"Sample {sample.sample_id!r} has no right answer, so nothing can be measured of it.",
                "Leave it out, or give its answer.",
            )
        own = list(sample.options) or [sample.answer]
        other = foils[row]
        if other is not None and other not in own:
            own.append(other)
        if compared and len(own) < 2:
            raise DataError(
                f"Sample {sample.sample_id!r} has no other option than its answer {sample.answer!r}.",
                "Give its options, or choose metric='log_prob'.",
            )
        words.append(own)
        right.append(own.index(sample.answer))
        foil.append(-1 if other is None else own.index(other))
    ids = torch.full((len(words), max(map(len, words))), -1)
    for row, own in enumerate(words):
        found = option_tokens(loaded.tokenizer, batch.prompts[row].text, own)
        if None in found.ids:
            raise DataError(
                f"The answers of sample {batch.samples[row].sample_id!r} cannot be told apart by one token "
                f"({found.note}).",
                "Give options whose first tokens differ.",
            )
        ids[row, : len(own)] = torch.tensor(found.ids)
    return AnswerTokens(ids, torch.tensor(right), torch.tensor(foil))
