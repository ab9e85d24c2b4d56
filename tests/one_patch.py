"""A LLaVA built by hand that answers by the brightness of patches, so that every attribution is known.

One layer, no norms: an image token holds the mean brightness of its own patch, in [-1, 1], and it says
F = logit(left) - logit(right) = 2 * sum over the prompt of attention * brightness; words have none.
`sharpness` 0: the last token attends to all T tokens alike, F = 2 / T * sum of brightness. A large sharpness:
it attends to the one patch that is `marked`, and F is twice that patch's brightness.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_models import PATCH, SIDE, llava
from torch import nn

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.train_architecture import IMAGE, VOCABULARY

GRID = SIDE // PATCH
HEADS = 4
# Coordinates of the residual streams.
BRIGHT, MARK, IS_WORD, ANSWER = range(4)
# Of the encoder's alone, and its head of `carried_patch`: (layer, head).
SOURCE, CARRIED = 4, 5
CARRIES = (1, 2)


def one_patch(marked: int = 27, sharpness: float = 0.0) -> LoadedModel:
    """The model; `marked` counts patches row by row."""
    loaded = llava(num_hidden_layers=1)
    model: Any = loaded.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        vision, text = model.model.vision_tower, model.model.language_model
        vision.pre_layrnorm = nn.Identity()
        vision.embeddings.patch_embedding.weight[BRIGHT] = 1 / (3 * PATCH**2)
        vision.embeddings.position_embedding.weight[1 + marked, MARK] = 1
        projector = nn.Linear(vision.config.hidden_size, text.config.hidden_size, bias=False)
        projector.weight.zero_()
        projector.weight[BRIGHT, BRIGHT] = projector.weight[MARK, MARK] = 1
        model.model.multi_modal_projector = projector
        text.embed_tokens.weight[:, IS_WORD] = 1
        text.rotary_emb.inv_freq.zero_()
        layer = text.layers[0]
        layer.input_layernorm = layer.post_attention_layernorm = text.norm = nn.Identity()
        layer.self_attn.q_proj.weight[0, IS_WORD] = sharpness * 8**0.5
        layer.self_attn.k_proj.weight[0, MARK] = 1
        layer.self_attn.v_proj.weight[0, BRIGHT] = 1
        layer.self_attn.o_proj.weight[ANSWER, 0] = 1
        model.lm_head.weight[VOCABULARY["left"], ANSWER] = 1
        model.lm_head.weight[VOCABULARY["right"], ANSWER] = -1
        text.embed_tokens.weight[IMAGE] = 0
    return loaded


def carried_patch(source: int = 12, marked: int = 27) -> LoadedModel:
    """Where the answer comes from the patch `source`: head `CARRIES` of the encoder moves it to `marked`.

    The other patches get the mean brightness from that head, and the last token reads `marked` alone.
    """
    loaded = one_patch(marked, sharpness=40.0)
    model: Any = loaded.model
    layer, head = CARRIES
    own = slice(head * 16, (head + 1) * 16)
    with torch.no_grad():
        vision = model.model.vision_tower
        vision.embeddings.position_embedding.weight[1 + source, SOURCE] = 1
        carrying = vision.encoder.layers[layer]
        carrying.layer_norm1 = nn.Identity()
        attention = carrying.self_attn
        attention.q_proj.weight[own][0, MARK] = 40.0 * 16**0.5
        attention.k_proj.weight[own][0, SOURCE] = 1
        attention.v_proj.weight[own][1, BRIGHT] = 1
        attention.out_proj.weight[CARRIED, head * 16 + 1] = 1
        projector = model.model.multi_modal_projector
        projector.weight[BRIGHT, BRIGHT] = 0
        projector.weight[BRIGHT, CARRIED] = 1
    return loaded


def bright_sample(seed: int = 0, only: int | None = None) -> tuple[Sample, NDArray[np.float32]]:
    """A question about an image of random patches, and the brightness (patch,) of each; or of `only` one."""
    level = np.random.default_rng(seed).integers(0, 256, GRID**2)
    if only is not None:
        # 127.5 would be 0 exactly; the rest is so close to it that it hardly counts.
        level = np.where(np.arange(GRID**2) == only, 255, 128)
    pixels = np.kron(level.reshape(GRID, GRID), np.ones((PATCH, PATCH)))[..., None].repeat(3, 2)
    sample = Sample(
        sample_id=f"bright-{seed}",
        images=(Image.fromarray(pixels.astype(np.uint8)),),
        question="where is the red square relative to the blue circle ?",
        options=("left", "right"),
    )
    return sample, (level / 127.5 - 1).astype(np.float32)
