"""Make an environment of vLLM for CPUs usable: a test environment's step, run once by `make test-vllm`.

The packages torchvision, torchaudio and torchcodec that vLLM asks for are, on some package indexes, linked
against a torch for CUDA only. On a torch for CPUs their compiled halves do not load, and then no
vision-language model can be imported at all. Nothing is wrong with a user's GPU machine, and this script
changes nothing where the packages import as they are. Where they do not, it

1. uninstalls torchaudio and torchcodec, which images do not need,
2. prepends to torchvision's ``__init__.py`` the declarations of the two operators that its import looks for.
   A file, because vLLM inspects model classes in fresh processes of its own.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MARK = "# Declared for a torch without CUDA by prepare_environment.py"
DECLARED = f"""{MARK}
import torch as _torch

_library = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports(name: str) -> bool:
    """Whether a package can be imported, in a process of its own."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def main() -> None:
    """Repair what does not import, and fail if that was not enough."""
    for name in ("torchaudio", "torchcodec"):
        if find_spec(name) is not None and not imports(name):
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", name], check=True)
            print(f"{name} does not load here: uninstalled")
    if imports("torchvision"):
        return
    found = find_spec_file("torchvision")
    text = found.read_text()
    if MARK not in text:
        found.write_text(f"{DECLARED}\n{text}")
        print(f"torchvision's compiled operators do not load here: declared in {found.name}")
    if not imports("torchvision"):
        sys.exit("torchvision cannot be imported, and declaring its operators did not help.")


def find_spec_file(name: str) -> Path:
    """The ``__init__.py`` of a package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"{name} is not installed.")
    return Path(spec.origin)


if __name__ == "__main__":
    main()
