"""Forwards of the tokens that a change can reach: the plain forward's logits, in every family."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from test_resumed_forward import FAMILIES, alone, watched
from torch import Tensor
from zoo import ZOO

from mechanistic.capture.later_tokens import (
    EarlierTokens,
    earlier_tokens,
    find_later_tokens,
    later_tokens,
    prove_later_tokens,
)
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.patch_batches import patch_batches
from mechanistic.capture.prompts import Inputs
from mechanistic.capture.resumed_forward import (
    ResumedForward,
    joined_inputs,
    plain_logits,
    prove_resumed_forward,
)
from mechanistic.store.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
# Of PaliGemma's prompts every token reads every other.
READING_BACK = tuple(dict.fromkeys((*FAMILIES, "gpt_oss", "llava_next", "idefics3", "smolvlm")))


def patched(loaded: LoadedModel, path: str, inputs: Inputs, row: int, values: Tensor) -> Tensor:
    """Logits of the model's own forward with one row of a layer's input replaced, by nothing but a hook."""

    def put(_: Any, args: Any, kwargs: Any) -> Any:
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        states[0, row] = values
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    handle = loaded.model.get_submodule(path).register_forward_pre_hook(put, with_kwargs=True)
    try:
        with torch.no_grad():
            logits: Tensor = loaded.model(**inputs, use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return logits


def known(resumed: ResumedForward, sample: Inputs, hidden: Tensor) -> EarlierTokens:
    inputs, last = joined_inputs(resumed.loaded, [sample])
    return earlier_tokens(resumed.loaded, lambda: resumed.logits(inputs, last, 0, hidden))


@pytest.mark.parametrize("name", READING_BACK)
def test_later_tokens__equals_the_plain_forward_of_every_patch(name: str) -> None:
    loaded = ZOO[name].build()
    path = ZOO[name].layers["text"]
    single = alone(loaded, name)[:2]
    resumed = prove_resumed_forward(loaded, *joined_inputs(loaded, single[:1]))
    entered = [watched(loaded, path, each)[0] for each in single]
    earlier = [known(resumed, each, states[0]) for each, states in zip(single, entered, strict=True)]
    lengths = [each["input_ids"].shape[1] for each in single]
    assert lengths[0] != lengths[1]
    random = np.random.default_rng(0)
    for layer in range(len(entered[0])):
        # Of both samples early, middle and last tokens: in one batch, and the later ones alone.
        places = [(0, 3), (0, lengths[0] // 2), (0, lengths[0] - 1), (1, 9), (1, lengths[1] - 2)]
        values = [entered[each][layer][0][random.integers(lengths[each])] for each, _ in places]
        for some in ([0, 1, 2, 3, 4], [1, 4], [2, 4]):
            owner, rows = zip(*(places[number] for number in some), strict=True)
            images = resumed.needs_images(layer)
            inputs, last = joined_inputs(loaded, [single[each] for each in owner], images=images)
            hidden = torch.nn.utils.rnn.pad_sequence([entered[each][layer][0] for each in owner], True)
            for place, (row, number) in enumerate(zip(rows, some, strict=True)):
                hidden[place, row] = values[number]
            begins = [earlier[each].reached(row) for each, row in zip(owner, rows, strict=True)]
            chosen = [earlier[each] for each in owner]
            with torch.no_grad(), later_tokens(loaded, layer, begins, last, chosen):
                got = resumed.logits(inputs, last, layer, hidden)
            for place, number in enumerate(some):
                sample = single[owner[place]]
                expected = patched(loaded, f"{path}.{layer}", sample, rows[place], values[number])
                scale = float(expected.abs().max())
                torch.testing.assert_close(got[place], expected, rtol=0, atol=1e-5 * scale)


def test_later_tokens__begin_where_the_mask_lets_them() -> None:
    """Gemma 3's image tokens read one another: a change of one reaches the first of its image."""
    for name in ("gemma3", "paligemma", "llava"):
        loaded = ZOO[name].build()
        sample = alone(loaded, name)[0]
        inputs, last = joined_inputs(loaded, [sample])
        found = earlier_tokens(loaded, partial(plain_logits, loaded, inputs, last))
        length = inputs["input_ids"].shape[1]
        image = (sample["input_ids"][0] == loaded.anatomy.image_token_id).nonzero()[:, 0].tolist()
        begins = [found.reached(position) for position in range(length)]
        for position, begin in enumerate(begins):
            if name == "paligemma":
                assert begin == 0
            else:
                inside = name == "gemma3" and position in image
                assert begin == (image[0] if inside else position)


def test_later_tokens__computes_nothing_else() -> None:
    loaded = ZOO["llava"].build()
    sample = alone(loaded, "llava")[0]
    resumed = prove_resumed_forward(loaded, *joined_inputs(loaded, [sample]))
    states = watched(loaded, ZOO["llava"].layers["text"], sample)[0]
    earlier = known(resumed, sample, states[0])
    inputs, last = joined_inputs(loaded, [sample])
    widths: list[int] = []
    layers = loaded.anatomy.stack("text").layers
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, out: widths.append(out.shape[1])) for layer in layers
    ]
    with torch.no_grad(), later_tokens(loaded, 0, [int(last) - 4], last, [earlier]):
        resumed.logits(inputs, last, 0, states[0])
    for handle in handles:
        handle.remove()
    assert widths == [5] * len(layers)
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_prove_later_tokens__says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ZOO["paligemma"].build()
    sample = alone(loaded, "paligemma")[0]
    resumed = prove_resumed_forward(loaded, *joined_inputs(loaded, [sample]))
    with pytest.raises(CaptureError, match="Every token reads the last one"):
        prove_later_tokens(resumed, sample)
    loaded = ZOO["llava"].build()
    sample = alone(loaded, "llava")[0]
    resumed = prove_resumed_forward(loaded, *joined_inputs(loaded, [sample]))
    assert prove_later_tokens(resumed, sample) <= 1e-5
    layer = loaded.anatomy.stack("text").layers[1]
    own = layer.mlp.forward
    # A layer that mixes its tokens beside its attention.
    monkeypatch.setattr(layer.mlp, "forward", lambda hidden: own(hidden + hidden.mean(1, keepdim=True)))
    with pytest.raises(CaptureError, match="a forward of later tokens alone misses the logits"):
        prove_later_tokens(resumed, sample)
    assert find_later_tokens(resumed, sample) is None

    def more(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "ages": torch.zeros(args[0].shape[:2])}

    layer.register_forward_pre_hook(more, with_kwargs=True)
    with pytest.raises(CaptureError, match=r"given as ages, of \(3, \d+\), may be of its tokens"):
        prove_later_tokens(resumed, sample)


def test_patch_batches__cost_least_together() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        tokens = random.integers(1, 40, 6).tolist()
        limit, cost = int(random.integers(1, 5)), int(random.integers(0, 50))
        found = patch_batches(tokens, limit, cost)
        assert sorted(number for batch in found for number in batch) == list(range(6))
        assert max(map(len, found)) <= limit
        total = sum(cost + len(batch) * max(tokens[number] for number in batch) for batch in found)
        assert total == _least(tuple(tokens), limit, cost)
    assert patch_batches([7] * 5, 2, 32) == [[0], [1, 2], [3, 4]]


def _least(tokens: tuple[int, ...], limit: int, cost: int) -> float:
    """By trying every division."""
    if not tokens:
        return 0
    first, rest = tokens[0], range(1, len(tokens))
    return min(
        cost
        + max(first, *(tokens[each] for each in others), 0) * (len(others) + 1)
        + _least(tuple(tokens[each] for each in rest if each not in others), limit, cost)
        for size in range(limit)
        for others in combinations(rest, size)
    )
