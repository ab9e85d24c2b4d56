"""Parquet files and Hugging Face directories, read with pyarrow; images one by one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from question_tables import draw_pictures, rows, save_to_disk, table_with_images

from mechanistic.capture.dataset import open_image
from mechanistic.capture.table_files import pyarrow
from mechanistic.capture.tabular_dataset import open_tabular
from mechanistic.store.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path)


def test_parquet__images_are_bytes_and_classes_have_names(folder: Path) -> None:
    pq.write_table(table_with_images(folder), folder / "validation.parquet", row_group_size=3)
    dataset = open_tabular(folder / "validation.parquet")
    assert (dataset.name, len(dataset)) == ("validation", 4)
    for number, sample in enumerate(dataset):
        assert sample.images == ((folder / f"pictures/{number}.png").read_bytes(),)
        assert sample.extra["place"] == ("indoors", "outdoors")[number % 2]
        assert type(sample.extra["seen"]) is bool
        assert type(sample.extra["size"]) is int
    assert open_image(dataset[3].images[0]).size == (24, 16)


def test_parquet__a_list_of_images_in_a_cell(folder: Path) -> None:
    pq.write_table(table_with_images(folder, as_list=True), folder / "t.parquet")
    assert len(open_tabular(folder / "t.parquet")[1].images) == 2


def test_parquet__paths_in_a_column_are_relative_to_the_folder(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows()), folder / "t.parquet")
    assert open_tabular(folder / "t.parquet")[0].images == (folder / "pictures/0.png",)


def test_parquet__shards_of_a_split_are_one_table(folder: Path) -> None:
    table = table_with_images(folder)
    (folder / "data").mkdir()
    pq.write_table(table.slice(0, 1), folder / "data/train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 3), folder / "data/test-00000-of-00002.parquet")
    pq.write_table(table.slice(3), folder / "data/test-00001-of-00002.parquet")
    with pytest.raises(
        DatasetError,
        match=r"has the splits test, train; none was named\.\n  Choose one: --split train, or split='train'",
    ):
        open_tabular(folder)
    dataset = open_tabular(folder, split="test")
    assert [sample.extra["size"] for sample in dataset] == [0, 1, 2, 3]
    assert dataset[3].images[0] == (folder / "pictures/3.png").read_bytes()
    with pytest.raises(DatasetError, match="not 'dev'"):
        open_tabular(folder, split="dev")


def test_parquet__reads_a_row_group_when_an_image_of_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(table_with_images(folder), folder / "t.parquet", row_group_size=2)
    read: list[tuple[int, str]] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, columns: list[str]) -> Any:
        read.append((group, columns[0]))
        return original(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    dataset = open_tabular(folder / "t.parquet")
    assert not [each for each in read if each[1] == "image"]
    _ = [dataset[number] for number in (0, 1, 2, 3)]
    assert [each for each in read if each[1] == "image"] == [(0, "image"), (1, "image")]


def test_parquet__a_damaged_file_is_named(folder: Path) -> None:
    path = folder / "t.parquet"
    pq.write_table(table_with_images(folder), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(
        DatasetError, match=r"t.parquet' is not a whole Parquet file \(.*\n  The file is damaged"
    ):
        open_tabular(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DatasetError, match="Git LFS pointer"):
        open_tabular(path)


def test_huggingface__a_saved_dataset_opens(folder: Path) -> None:
    saved = save_to_disk(table_with_images(folder).replace_schema_metadata(None), folder / "saved")
    dataset = open_tabular(saved)
    assert dataset.name == "saved"
    assert [sample.extra["place"] for sample in dataset] == ["indoors", "outdoors"] * 2
    assert dataset[2].images[0] == (folder / "pictures/2.png").read_bytes()
    assert len(dataset.files) == 2


def test_huggingface__a_saved_dictionary_of_splits_opens(folder: Path) -> None:
    table = table_with_images(folder)
    save_to_disk(table, folder / "saved/train")
    save_to_disk(table.slice(0, 2), folder / "saved/test", shards=1)
    (folder / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert len(open_tabular(folder / "saved", split="test")) == 2
    with pytest.raises(DatasetError, match="has the splits train, test; none was named"):
        open_tabular(folder / "saved")


def test_huggingface__an_incomplete_copy_is_named(folder: Path) -> None:
    saved = save_to_disk(table_with_images(folder), folder / "saved")
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DatasetError, match=r"lacks data-00001-of-00002.arrow, which its state.json names"):
        open_tabular(saved)
    (saved / "state.json").write_text(json.dumps({"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DatasetError, match=r"a selection of rows .*\n  Save it flat"):
        open_tabular(saved)
    (saved / "state.json").write_text("{")
    with pytest.raises(DatasetError, match=r"state.json' cannot be read"):
        open_tabular(saved)


def test_huggingface__a_cache_folder_opens_by_split(folder: Path) -> None:
    cache = folder / "cache"
    cache.mkdir()
    for name, count in (
        ("shots-train.arrow", 3),
        ("shots-test.arrow", 1),
        ("cache-0123456789abcdef.arrow", 4),
    ):
        part = table_with_images(folder).slice(0, count)
        with pa.ipc.new_stream(str(cache / name), part.schema) as writer:
            writer.write_table(part)
    assert len(open_tabular(cache, split="train")) == 3
    assert len(open_tabular(cache, split="test")) == 1


def test_arrow__a_file_in_the_indexed_format_opens(folder: Path) -> None:
    table = table_with_images(folder)
    with pa.ipc.new_file(str(folder / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert open_tabular(folder / "t.arrow")[1].images[0] == (folder / "pictures/1.png").read_bytes()


def test_binary_columns_beside_the_image_are_left_out_and_named(folder: Path) -> None:
    table = table_with_images(folder)
    table = table.append_column("depth", pa.array([b"1"] * 4))
    pq.write_table(table, folder / "t.parquet")
    dataset = open_tabular(folder / "t.parquet")
    assert "depth" not in dataset[0].extra
    assert "column 'depth' holds files and is left out" in dataset.problem_report()


def test_tabular__travels_to_another_process(folder: Path) -> None:
    pq.write_table(table_with_images(folder), folder / "t.parquet")
    dataset = open_tabular(folder / "t.parquet")
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert copy[2] == dataset[2]
    assert copy.fingerprint() == dataset.fingerprint()
    assert len(pickle.dumps(dataset)) < 8000


def test_open_tabular__files_of_different_columns_are_not_one_table(folder: Path) -> None:
    table = table_with_images(folder)
    pq.write_table(table, folder / "test-00000-of-00002.parquet")
    pq.write_table(table.drop_columns(["size"]), folder / "test-00001-of-00002.parquet")
    with pytest.raises(DatasetError, match="Files of one split have the same columns"):
        open_tabular(folder)


def test_pyarrow__names_the_command_when_it_is_missing() -> None:
    with pytest.raises(DatasetError, match=r"not installed\.\n  Type: pip install"):
        pyarrow("pyarrow_that_is_not_there")
