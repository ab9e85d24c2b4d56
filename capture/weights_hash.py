"""What identifies a model's weights: a hash over its files, or over its parameters where there are none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def hash_weights(folder: Path) -> str:
    """SHA-256 of the one weight file in a folder, or of the lines "hash  name" of several."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    hashes = {file.name: _hash_file(file) for file in files}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(
        "".join(f"{value}  {name}\n" for name, value in hashes.items()).encode()
    ).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_parameters(model: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
