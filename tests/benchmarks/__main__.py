"""`make bench`: every benchmark in one run, each a script that prints ratios measured side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Runs in the environment of vLLM: make bench-vllm.
ELSEWHERE = {"bench_vllm"}


def main() -> int:
    """Run each bench_*.py in a process of its own, on one thread; exit code 1 if any failed."""
    failed = []
    wanted = sys.argv[1:] or sorted({path.stem for path in HERE.glob("bench_*.py")} - ELSEWHERE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for name in wanted:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py")]
        if subprocess.run(command, env=environment).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
