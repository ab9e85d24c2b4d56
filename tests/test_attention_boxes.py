"""Attention against boxes in the picture."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import is_image, stacked_attention, with_boxes
from sklearn.metrics import roc_auc_score
from synthetic_run import synthetic_run

from mechanistic.analysis.attention_boxes import attention_boxes, patches_in_box, sample_boxes
from mechanistic.store.errors import DimensionError, SpecificationError

# Patches of 16 pixels on a 4 x 4 grid: the two in the middle of the top row, and one corner.
BOXES = {"subject": (16, 0, 48, 16), "object": (50, 50, 64, 64)}
SUBJECT, OBJECT = [1, 2], [15]


def make(**changes: object) -> xr.DataTree:
    return with_boxes(synthetic_run(grid=4, **changes), BOXES)


def test_attention_boxes__patches_by_hand() -> None:
    row, col = np.divmod(np.arange(4), 2)
    edges = {"box_x0": col * 8, "box_y0": row * 8, "box_x1": col * 8 + 8, "box_y1": row * 8 + 8}
    patches = {name: values.astype(np.float32) for name, values in edges.items()}

    def members(*box: float, overlap: float = 0.5) -> list[int]:
        return np.flatnonzero(patches_in_box(patches, np.array(box, np.float32), overlap=overlap)).tolist()

    assert members(0, 0, 16, 8) == [0, 1]
    assert members(0, 0, 12, 8) == [0, 1]
    assert members(0, 0, 11, 8) == [0]
    assert members(0, 0, 11, 8, overlap=0.3) == [0, 1]
    # A box smaller than a patch has the patch that holds it.
    assert members(9, 9, 11, 11) == [3]


def test_attention_boxes__sklearn_and_plain_sums() -> None:
    run = make()
    lazy = attention_boxes(run)
    assert all(isinstance(variable.data, da.Array) for variable in lazy.data_vars.values())
    found = lazy.compute()
    for row, sample in enumerate(found["sample_index"].values):
        image = np.flatnonzero(is_image(run, sample))
        weights = stacked_attention(run, sample)[:, :, -2]
        for name, patches in (("subject", SUBJECT), ("object", OBJECT)):
            members = np.isin(np.arange(16), patches)
            np.testing.assert_allclose(
                found[f"mass_{name}"].values[:, row], weights[..., image[members]].sum(-1), atol=1e-5
            )
            expected = [[roc_auc_score(members, head[image]) for head in layer] for layer in weights]
            np.testing.assert_allclose(found[f"auroc_{name}"].values[:, row], expected, atol=1e-6)


def test_attention_boxes__only_patches_that_the_query_sees_count() -> None:
    run = make(query_tokens="all")
    found = attention_boxes(run, tokens="@4", sample=2, layer=1)
    # Position 4 sees patches 0 to 3, of which 1 and 2 are the subject's; the object's comes later.
    weights = stacked_attention(run, 2)[1][:, 4]
    expected = [roc_auc_score([0, 1, 1, 0], head[1:5]) for head in weights]
    np.testing.assert_allclose(found["auroc_subject"].values[0, 0], expected, atol=1e-6)
    assert np.isnan(found["auroc_object"].values).all()
    assert (found["mass_object"].values == 0).all()


def test_attention_boxes__ties_count_half() -> None:
    run = make()
    run["text/q"]["q"] = run["text/q"]["q"] * 0
    assert (attention_boxes(run)["auroc_subject"].values == 0.5).all()


def test_attention_boxes__planted_patch_is_found() -> None:
    found = attention_boxes(make(hub=1 + OBJECT[0]))
    assert (found["auroc_object"].values > 0.99).mean() > 0.9
    assert found["mass_object"].mean() > 5 * found["mass_subject"].mean()


def test_attention_boxes__missing_boxes_are_unknown() -> None:
    run = make()
    samples = run["samples"].to_dataset()
    for edge in ("x0", "y0", "x1", "y1"):
        samples[f"subject_{edge}"] = samples[f"subject_{edge}"].astype(np.int64)
        samples[f"subject_{edge}"][3] = -1
    run["samples"] = xr.DataTree(samples)
    assert np.isnan(sample_boxes(run, ["subject"])[3]).all()
    found = attention_boxes(run)
    assert np.isnan(found["auroc_subject"].values).any(axis=(0, 2)).tolist() == [n == 3 for n in range(12)]
    assert not np.isnan(found["auroc_object"].values).any()


def test_attention_boxes__another_image_counts_for_neither() -> None:
    found = attention_boxes(make(), image=1).compute()
    assert (found["mass_subject"].values == 0).all()
    assert np.isnan(found["auroc_subject"].values).all()


def test_attention_boxes__errors() -> None:
    with pytest.raises(
        DimensionError, match=r"no subject_x0, .*boxes of: nothing\.\n  Boxes are dataset columns"
    ):
        attention_boxes(synthetic_run())
    with pytest.raises(DimensionError, match=r"no cup_x0.*boxes of: object, subject"):
        attention_boxes(make(), boxes=["cup"])
    with pytest.raises(SpecificationError, match="overlap of 0"):
        attention_boxes(make(), overlap=0)
