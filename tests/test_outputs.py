"""An output folder is judged before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run

from mechanistic.capture.outputs import find_output
from mechanistic.capture.parts import PartOf
from mechanistic.capture.shapes import Shapes
from mechanistic.store import RunWriter
from mechanistic.store.draft import new_draft
from mechanistic.store.errors import OutputExistsError
from mechanistic.store.lock import take_lock
from mechanistic.store.parts import part_path
from mechanistic.store.root import open_root

COUNT, PARTS = 4, 2
DATA = Shapes(COUNT)
MODEL = {"name": "made-up", "backend": "transformers", "dtype": "float32"}
CAPTURE = {"sites": ["text.*.k"], "batch_size": 8}
ATTRIBUTES: dict[str, Any] = {
    "model": {**MODEL, "revision": "1"},
    "dataset": {
        "name": DATA.name,
        "hash": DATA.fingerprint(),
        "num_samples": COUNT,
        "prompt_template": "none",
    },
    "capture": CAPTURE,
}


def find(path: Path, part: int | None = None, **changed: Any) -> tuple[Path, bool]:
    own = PartOf(part, PARTS) if part is not None else None
    wanted = {"model": MODEL, "dataset": DATA, "capture": CAPTURE, "part": own, **changed}
    return find_output(path, **wanted)


def write(path: Path, *, finish: bool, attributes: dict[str, Any] = ATTRIBUTES) -> None:
    with RunWriter.create(path, attributes, small_run.groups(), samples=COUNT) as writer:
        for sample in range(COUNT if finish else 1):
            writer.append(small_run.rows(sample), samples=1)
        writer.finish() if finish else writer.commit()


def write_part(run: Path, index: int, *, finish: bool) -> None:
    open_root(run, ATTRIBUTES, parts=PARTS)
    part = PartOf(index, PARTS).attributes(COUNT)
    write(
        Path(part_path(run, index)),
        finish=finish,
        attributes={**ATTRIBUTES, "capture": {**CAPTURE, "part": part}},
    )


def test_find_output__says_where_and_whether_anything_is_left(tmp_path: Path) -> None:
    assert find(tmp_path / "new") == (tmp_path / "new", False)
    assert find(tmp_path / "new", 1) == (tmp_path / "new" / "parts" / "0001", False)
    write(tmp_path / "begun", finish=False)
    assert find(tmp_path / "begun") == (tmp_path / "begun", False)
    write(tmp_path / "done", finish=True)
    assert find(tmp_path / "done") == (tmp_path / "done", True)
    write_part(tmp_path / "parts", 0, finish=True)
    assert [find(tmp_path / "parts", index)[1] for index in range(PARTS)] == [True, False]


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("part", [None, 0, 1])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": {**MODEL, "name": "other"}}, "model.name is 'made-up', not 'other'"),
        ({"model": {**MODEL, "dtype": "float16"}}, "model.dtype is 'float32', not 'float16'"),
        ({"dataset": Shapes(COUNT, seed=1)}, "dataset.hash is "),
        ({"capture": {**CAPTURE, "batch_size": 2}}, "capture.batch_size is 8, not 2"),
    ],
)
def test_find_output__refuses_the_run_of_another_job(
    tmp_path: Path, finish: bool, part: int | None, changed: dict[str, Any], says: str
) -> None:
    run = tmp_path / "run"
    if part is None:
        write(run, finish=finish)
    else:
        # Of part 1 nothing is there but what all parts share.
        write_part(run, 0, finish=finish)
    with pytest.raises(OutputExistsError, match=says):
        find(run, part, **changed)


def test_find_output__refuses_another_division_into_parts(tmp_path: Path) -> None:
    write_part(tmp_path / "parts", 0, finish=False)
    with pytest.raises(OutputExistsError, match="is a run in 2 parts"):
        find(tmp_path / "parts")
    for index in (0, 3):
        with pytest.raises(OutputExistsError, match="parts is 2, not 4"):
            find_output(tmp_path / "parts", MODEL, DATA, CAPTURE, PartOf(index, 4))
    write(tmp_path / "one", finish=False)
    with pytest.raises(OutputExistsError, match="unfinished run of one part"):
        find(tmp_path / "one", 0)
    write(tmp_path / "merged", finish=False, attributes={**ATTRIBUTES, "merged_from_parts": 2})
    assert find(tmp_path / "merged", 0) == (tmp_path / "merged", False)


def occupied(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def foreign_zarr(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')


@pytest.mark.parametrize("part", [None, 0])
@pytest.mark.parametrize("make", [occupied, foreign_zarr, Path.touch])
def test_find_output__refuses_what_is_no_run(
    tmp_path: Path, make: Callable[[Path], None], part: int | None
) -> None:
    make(tmp_path / "held")
    with pytest.raises(OutputExistsError, match="exists and is not a run"):
        find(tmp_path / "held", part)


@pytest.mark.parametrize("part", [None, 0])
def test_find_output__refuses_a_second_writer(tmp_path: Path, part: int | None) -> None:
    run = tmp_path / "run"
    own = run if part is None else Path(part_path(run, part))
    if part is not None:
        open_root(run, ATTRIBUTES, parts=PARTS)
    draft, lock = new_draft(own)
    with pytest.raises(OutputExistsError, match=f"another process is writing {own} "):
        find(run, part)
    lock.close()
    assert find(run, part) == (own, False)
    shutil.rmtree(draft)
    if part is None:
        write(run, finish=False)
    else:
        write_part(run, part, finish=False)
    with take_lock(own), pytest.raises(OutputExistsError, match=f"another process is writing {own} "):
        find(run, part)
    assert find(run, part) == (own, False)
