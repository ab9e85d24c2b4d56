"""Compare two runs of the same samples, group by group and array by array."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mechanistic.store import open_run

TOLERANCE = 1e-5


def assert_same_runs(expected: Path, got: Path, *, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Groups, labels and tables are equal, numbers within `tolerance` of the largest; returns the errors."""
    first, second = open_run(expected), open_run(got)
    assert {node.path for node in first.subtree} == {node.path for node in second.subtree}
    errors: dict[str, float] = {}
    for node in first.subtree:
        own, other = node.to_dataset(), second[node.path].to_dataset()
        assert set(own.variables) == set(other.variables), node.path
        assert set(own.coords) == set(other.coords), node.path
        for name, array in other.variables.items():
            where = f"{node.path}/{name}"
            wanted, values = own[name].values, array.values
            assert own[name].dims == array.dims, where
            assert (wanted.shape, wanted.dtype) == (values.shape, values.dtype), where
            if wanted.dtype.kind != "f":
                np.testing.assert_array_equal(values, wanted, where)
                continue
            scale = float(np.nanmax(np.abs(wanted), initial=1e-30))
            np.testing.assert_allclose(values, wanted, rtol=0, atol=tolerance * scale, err_msg=where)
            errors[where] = float(np.nanmax(np.abs(values - wanted), initial=0)) / scale
        for attribute in ("attention", "definition", "tokens", "source_dtype", "heads_per_kv_head"):
            assert node.attrs.get(attribute) == second[node.path].attrs.get(attribute), node.path
    assert first.attrs["model"]["weights_sha256"] == second.attrs["model"]["weights_sha256"]
    return errors
