"""What identifies samples that no dataset vouches for: a hash over everything a model is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields

from .dataset import Sample, load_image


def hash_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 over the fields of the samples, in order, of images over their encoded files.

    Raises
    ------
    ImageError    an image is missing, or is none.
    """
    digest = hashlib.sha256()
    for sample in samples:
        content = {each.name: getattr(sample, each.name) for each in fields(sample)}
        content["images"] = [load_image(image, sample_id=sample.sample_id).sha256 for image in sample.images]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
