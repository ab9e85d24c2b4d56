"""What is wrong with a dataset's rows: found when it is opened, and told to whoever runs a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What was done about a problem of each kind, in the order in which a report lists them.
KINDS = {
    "no question": "left out: there is nothing to ask",
    "no captions": "left out: there is nothing to compare",
    "files": "kept as it is",
    "image": "kept; it fails when its image is opened",
    "id": "kept under its row number",
    "wording": "kept as it is; subject, object and options are unknown",
    "names": "kept as it is",
    "answer": "kept as the file has it, unscored where the answer is not an option",
    "options": "kept, with the options named in the problem",
    "surplus text": "kept without that text",
    "contradiction": "kept as it is",
    "duplicate": "kept as it is",
    "layout": "kept in the usual layout",
    "column": "changed as said",
    "order": "kept as it is",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong in a row (counted from 0, -1: in the dataset as a whole), and what was made of it."""

    row: int
    kind: str
    what: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.what}" if self.row >= 0 else self.what


def problem_report(name: str, samples: int, problems: Sequence[Problem], *, examples: int = 3) -> str:
    """The problems of a dataset for a person: how many of each kind, what was done, and the first few.

    An empty string for a dataset without problems.
    """
    if not problems:
        return ""
    rows = {problem.row for problem in problems if problem.row >= 0}
    lines = [f"{name}: {len(rows)} rows with problems, {samples} samples"]
    for kind, done in KINDS.items():
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            lines.append(f"  {kind} ({len(found)}): {done}")
            lines += [f"    {problem}" for problem in found[:examples]]
            if len(found) > examples:
                lines.append(f"    and {len(found) - examples} more")
    return "\n".join(lines)


def kinds_of(problems: Sequence[Problem], row: int) -> str:
    """The kinds of a row's problems in one string, for its column `problem`; "" for a clean row."""
    return "; ".join(dict.fromkeys(problem.kind for problem in problems if problem.row == row))
