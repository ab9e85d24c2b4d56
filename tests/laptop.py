"""What a laptop without torch does with a run: opened and analysed here by a fresh installation."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import xarray as xr

import mechanistic.analysis as analysis
from mechanistic.store import open_run
from mechanistic.store.verify import verify_run


def main(path: Path) -> None:
    assert importlib.util.find_spec("torch") is None
    assert importlib.util.find_spec("transformers") is None
    assert verify_run(path) == []
    run = open_run(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = xr.open_datatree(path, engine="zarr", chunks={})
    for name in ("text/resid_post", "text/q", "samples"):
        ours, theirs = run[name].to_dataset(), plain[name].to_dataset()
        for variable in ours.data_vars:
            np.testing.assert_array_equal(ours[variable].values, theirs[variable].values)
    entropy = analysis.attention_entropy(run, tokens="last").compute()
    assert float(entropy["attention_entropy"].min()) >= 0
    mass = analysis.attention_mass(run, tokens="last").compute()
    total = mass["mass_image"] + mass["mass_text"] + mass["mass_special"] + mass["mass_answer"]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    top = analysis.attention_concentration(run, k=5, tokens="last").compute()
    assert float(top["attention_concentration"].max()) <= 1 + 1e-6
    row = analysis.attention_pattern(run, sample=0, layer=2, head=0, query="last")[
        "attention_pattern"
    ].compute()
    np.testing.assert_allclose(float(row.sum()), 1, atol=1e-5)
    analysis.plot_attention_on_image(analysis.sample_image(run, 0), row.squeeze())
    probe = analysis.linear_probe(run, target="relation", tokens="last").compute()
    assert float(probe["accuracy"].isel(layer=-1)) > 0.9
    for name in (
        "attention_distance",
        "attention_sparsity",
        "attention_boxes",
        "two_hop",
        "text_hops",
        "hub_tokens",
        "head_importance",
        "accuracy",
        "logit_lens",
        "representational_dissimilarity",
        "linear_cka",
    ):
        result = getattr(analysis, name)(run).compute()
        assert any(bool(variable.notnull().any()) for variable in result.data_vars.values()), name
    analysis.cross_attention(run, sample=0).compute()
    axes = analysis.class_directions(run, target="relation").compute()
    assert axes.sizes["class"] == 4
    lens = analysis.logit_lens(run).compute()
    assert float(lens["lens_correct"].isel(layer=-1).mean()) > 0.9
    assert "torch" not in sys.modules
    print("no torch, and every analysis works")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
