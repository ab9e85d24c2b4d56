"""Individual, pair and set accuracy, with their intervals and baselines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest
from small_run import write_run
from synthetic_run import synthetic_run

from mechanistic.analysis.accuracy import UNITS, accuracy, accuracy_lines
from mechanistic.analysis.minimal_pairs import minimal_pairs
from mechanistic.capture.dataset import Dataset
from mechanistic.capture.whatsup import open_whatsup
from mechanistic.store import open_run
from mechanistic.store.errors import DimensionError, SpecificationError
from mechanistic.store.reader import group

PUBLISHED = Path(
    os.environ.get(
        "MECHANISTIC_QUESTION_FILES", Path(__file__).parents[2] / "shared" / "data" / "whatsup_prompts"
    )
)
FOUR = ("left", "right", "on", "under")


def table(
    answers: list[str],
    groups: list[str],
    correct: list[int],
    *,
    options: tuple[str, ...] = FOUR,
    **columns: list[Any],
) -> xr.Dataset:
    """A samples table as a run has it."""
    count = len(answers)
    dataset = xr.Dataset(
        {
            "answer": ("sample", np.array(answers, object)),
            "relation": ("sample", np.array(answers, object)),
            "group": ("sample", np.array(groups, object)),
            "options": (("sample", "option"), np.array([options] * count, object)),
            "answer_index": (
                "sample",
                np.array([options.index(a) if a in options else -1 for a in answers], np.int8),
            ),
            "correct": ("sample", np.array(correct, np.int8)),
            "status": ("sample", np.zeros(count, np.int8)),
        }
    )
    return dataset.assign({name: ("sample", np.array(values)) for name, values in columns.items()})


def from_dataset(dataset: Dataset, correct: np.ndarray) -> xr.Dataset:
    samples = [dataset[row] for row in range(len(dataset))]
    width = max(len(sample.options) for sample in samples)
    columns = {
        name: ("sample", np.array([getattr(sample, name) or "" for sample in samples], object))
        for name in ("answer", "relation", "group", "subject", "object")
    }
    options = np.full((len(samples), width), "", object)
    for row, sample in enumerate(samples):
        options[row, : len(sample.options)] = sample.options
    return xr.Dataset({**columns, "options": (("sample", "option"), options), "correct": ("sample", correct)})


def published_definition(samples: xr.Dataset) -> dict[str, float]:
    """Pair and set accuracy as the papers' own code has it: over N/2 pairs and N/4 sets."""
    sets: dict[str, dict[str, bool]] = {}
    for name, answer, correct in zip(
        *(samples[name].values for name in ("group", "answer", "correct")), strict=True
    ):
        sets.setdefault(str(name), {})[str(answer)] = bool(correct)
    one, other = ("on", "under") if "on" in next(iter(sets.values())) else ("front", "behind")
    pairs = sum(each["left"] and each["right"] for each in sets.values())
    pairs += sum(each[one] and each[other] for each in sets.values())
    count = samples.sizes["sample"]
    return {
        "individual": float(samples["correct"].mean()),
        "pair": pairs / (count / 2),
        "set": sum(all(each.values()) for each in sets.values()) / (count / 4),
    }


def test_accuracy__by_hand() -> None:
    # The first set is right but for "under"; the second has left and right; the third lacks two samples.
    samples = table(
        [*FOUR, *FOUR, "left", "right"],
        ["a"] * 4 + ["b"] * 4 + ["c"] * 2,
        [1, 1, 1, 0, 1, 1, 0, 0, 1, 0],
    )
    result = accuracy(samples)
    assert result["unit"].values.tolist() == list(UNITS)
    assert result["n"].values.tolist() == [10, 5, 2]
    assert result["left_out"].values.tolist() == [0, 0, 2]
    np.testing.assert_allclose(result["accuracy"], [6 / 10, 2 / 5, 0])
    # Always "left" is right in 3 of 10, and never in both of a pair.
    assert result.attrs["majority_answer"] == "left"
    np.testing.assert_allclose(result["majority_accuracy"], [3 / 10, 0, 0])
    np.testing.assert_allclose(result["chance_accuracy"], [1 / 4, 1 / 16, 1 / 256])
    assert (result.attrs["failed"], result.attrs["unscored"]) == (0, 0)


def test_accuracy__intervals_are_wilsons() -> None:
    samples = table([*FOUR] * 6, [f"g{i // 4}" for i in range(24)], [1, 1, 0, 1] * 3 + [1, 1, 1, 1] * 3)
    result = accuracy(samples, level=0.9)
    for unit in UNITS:
        here = result.sel(unit=unit)
        count = int(here["n"])
        right = round(float(here["accuracy"]) * count)
        expected = binomtest(right, count).proportion_ci(0.9, method="wilson")
        np.testing.assert_allclose(
            [here["accuracy_low"], here["accuracy_high"]], [expected.low, expected.high]
        )


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published question files are not here")
@pytest.mark.parametrize(
    ("name", "majority"),
    [
        ("Controlled_Images_A", 25.0),
        ("Controlled_Images_B", 25.0),
        ("COCO_QA_one_obj", 33.1),
        ("COCO_QA_two_obj", 34.1),
        ("VG_QA_one_obj", 33.8),
        ("VG_QA_two_obj", 47.1),
    ],
)
def test_accuracy__published_sets_have_the_published_baselines(name: str, majority: float) -> None:
    dataset = open_whatsup(name, PUBLISHED, text_only=True)
    correct = (np.random.default_rng(0).random(len(dataset)) < 0.8).astype(np.int8)
    samples = from_dataset(dataset, correct)
    result = accuracy(samples)
    assert round(100 * float(result["majority_accuracy"].sel(unit="individual")), 1) == majority
    if name.startswith("Controlled"):
        assert result["n"].values.tolist() == [len(dataset), len(dataset) // 2, len(dataset) // 4]
        for unit, expected in published_definition(samples).items():
            assert float(result["accuracy"].sel(unit=unit)) == pytest.approx(expected)
    else:
        assert result["n"].values.tolist() == [len(dataset), 0, 0]
        assert np.isnan(result["accuracy"].values[1:]).all()


def test_accuracy__failed_and_unscored_samples_are_in_no_denominator() -> None:
    samples = table([*FOUR, *FOUR], ["a"] * 4 + ["b"] * 4, [1, 1, -1, 1, 1, 1, 1, 1])
    samples["status"][7] = 1
    result = accuracy(samples)
    assert result["n"].values.tolist() == [6, 2, 0]
    assert result["left_out"].values.tolist() == [2, 4, 8]
    assert (result.attrs["failed"], result.attrs["unscored"]) == (1, 1)
    np.testing.assert_allclose(result["accuracy"].values[:2], 1)
    assert np.isnan(float(result["accuracy"][2]))


def test_accuracy__by_a_column() -> None:
    samples = table(
        [*FOUR, *FOUR], ["a"] * 4 + ["b"] * 4, [1, 1, 1, 0, 0, 1, 1, 0], scene=["in"] * 4 + ["out"] * 4
    )
    result = accuracy(samples, by="relation")
    assert result["relation"].values.tolist() == sorted(FOUR)
    np.testing.assert_allclose(result["accuracy"].sel(unit="individual"), [1 / 2, 1, 1, 0])
    np.testing.assert_allclose(result["majority_accuracy"].sel(unit="individual"), [1, 0, 0, 0])
    # A pair spans two relations, so no relation has one.
    assert result["n"].sel(unit="pair").values.tolist() == [0] * 4
    scenes = accuracy(samples, by="scene")
    np.testing.assert_allclose(scenes["accuracy"].sel(unit="pair"), [1 / 2, 0])
    assert scenes["n"].values.tolist() == [[4, 2, 1], [4, 2, 1]]


def test_accuracy__logits_choose_among_the_options() -> None:
    samples = table(["left", "right", "on", "under"], ["a"] * 4, [0, 0, 0, 0])
    logits = np.full((4, 4), -5.0, np.float32)
    logits[0, 0] = 1  # right
    logits[1, 0] = 1  # another option
    logits[2, 2] = logits[2, 3] = 1  # two at once: none is chosen
    logits[3, 1] = np.nan  # an option without a token of its own
    samples["option_logits"] = (("sample", "option"), logits)
    result = accuracy(samples, scored="logits")
    assert result["n"].values.tolist() == [3, 1, 0]
    np.testing.assert_allclose(result["accuracy"].values[:2], [1 / 3, 0])
    assert result.attrs["unscored"] == 1


def test_accuracy__padding_of_unequal_options_is_no_option() -> None:
    samples = table(["left", "right"], ["", ""], [1, 0], options=("left", "right", ""))
    samples["option_logits"] = (("sample", "option"), np.array([[2, 1, np.nan], [2, 1, np.nan]], np.float32))
    result = accuracy(samples, scored="logits").sel(unit="individual")
    assert (float(result["accuracy"]), float(result["chance_accuracy"]), int(result["n"])) == (0.5, 0.5, 2)


def test_minimal_pairs__need_one_question_of_several_images() -> None:
    answers = ["left", "right", "left", "left", "right", "left", "right", "true", "false"]
    groups = ["a", "a", "b", "b", "b", "", "", "c", "c"]
    samples = table(answers, groups, [1] * 9, options=("left", "right", "true", "false"))
    found = minimal_pairs(samples)
    assert [pair.tolist() for pair in found.pairs] == [[0, 1], [7, 8]]
    assert found.sets == ()
    images = samples.assign(image_name=("sample", np.array(list("abcdefgzz"), object)))
    assert [pair.tolist() for pair in minimal_pairs(images).pairs] == [[0, 1]]
    assert accuracy(images)["n"].values.tolist() == [9, 1, 0]
    subjects = samples.assign(subject=("sample", np.array(["cup", "mug", *["x"] * 7], object)))
    assert [pair.tolist() for pair in minimal_pairs(subjects).pairs] == [[7, 8]]
    assert minimal_pairs(samples.drop_vars("group")).pairs == ()


def test_minimal_pairs__other_words_may_be_opposites() -> None:
    samples = table(["behind", "in front of"], ["a", "a"], [1, 1], options=("behind", "in front of"))
    assert [pair.tolist() for pair in minimal_pairs(samples).pairs] == [[0, 1]]
    samples = table(["near", "far"], ["a", "a"], [1, 1], options=("near", "far"))
    assert minimal_pairs(samples).pairs == ()
    assert accuracy(samples, opposites={"near": "far"})["n"].values.tolist() == [2, 1, 1]


def test_accuracy__of_a_run_and_of_its_lazy_table(tmp_path: Path) -> None:
    run = synthetic_run(sets=5)
    options = np.array([["left", "right", "above", "below"]] * 20, object)
    samples = group(run, "samples").assign(options=(("sample", "option"), options))
    run["samples"].dataset = samples
    result = accuracy(run)
    xr.testing.assert_identical(result, accuracy(samples.load()))
    assert result["n"].values.tolist() == [20, 10, 5]
    assert float(result["accuracy"][0]) == pytest.approx(float(samples["correct"].mean()))
    stored = accuracy(open_run(write_run(tmp_path / "run.zarr")))
    assert int(stored["n"][0]) == 12


def test_accuracy_lines__read_like_a_sentence() -> None:
    samples = table([*FOUR, *FOUR], ["a"] * 4 + ["b"] * 4, [1, 1, 1, 1, 1, 1, 0, 0])
    assert accuracy_lines(accuracy(samples)) == [
        ("accuracy", "75.0% (40.9% to 92.9%, n 8); always 'left' 25.0%, guessing 25.0%"),
        ("pair accuracy", "75.0% (30.1% to 95.4%, n 4); always 'left' 0.0%, guessing 6.2%"),
        ("set accuracy", "50.0% (9.5% to 90.5%, n 2); always 'left' 0.0%, guessing 0.4%"),
    ]
    single = accuracy(table(["left"], [""], [1]))
    assert [name for name, _ in accuracy_lines(single)] == ["accuracy"]
    free = accuracy(table(["behind"], [""], [1], options=("",)))
    assert accuracy_lines(free)[0][1].endswith("n 1); always 'behind' 100.0%")


def test_accuracy__errors() -> None:
    samples = table(["left"], ["a"], [1])
    with pytest.raises(DimensionError, match=r"no column 'correct'; they have answer, .*\n  Give a run"):
        accuracy(samples.drop_vars("correct"))
    with pytest.raises(DimensionError, match="no column 'scene'"):
        accuracy(samples, by="scene")
    with pytest.raises(DimensionError, match="no column 'option_logits'"):
        accuracy(samples, scored="logits")
    with pytest.raises(SpecificationError, match="scored is 'substring'"):
        accuracy(samples, scored="substring")  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="level is 95"):
        accuracy(samples, level=95)
