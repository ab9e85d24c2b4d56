"""Where a run lies: a folder or a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit


def is_url(where: str) -> bool:
    return len(urlsplit(where).scheme) > 1


def read_file(where: str | Path, name: str) -> bytes:
    """The bytes of a file in a folder or under a URL. Raises FileNotFoundError."""
    if is_url(str(where)):
        import fsspec

        filesystem, folder = fsspec.core.url_to_fs(str(where))
        data: bytes = filesystem.cat_file(f"{folder.rstrip('/')}/{name}")
        return data
    try:
        return (Path(where) / name).read_bytes()
    except NotADirectoryError:
        raise FileNotFoundError(name) from None
