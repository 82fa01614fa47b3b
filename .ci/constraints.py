"""Renew a file of constraints from `pip freeze` on standard input: `pip freeze | python .ci/constraints.py FILE`.

Sections, comments and order stay. A pin gets the installed version, and is removed if the package is not installed;
new packages are added to the last section, which is in alphabetical order.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)")
OF_ANOTHER_BUILD = ("nvidia-", "cuda-")  # torch with CUDA requires their exact versions itself


def canonical(name: str) -> str:
    """The normalized name of a project, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, tuple[str, str]]:
    """Canonical name -> (name, version), the version without its local part: 2.13.0+cpu is 2.13.0."""
    matches = filter(None, map(PIN.match, text.splitlines()))
    versions = {canonical(name): (name, version.partition("+")[0]) for name, version in (m.groups() for m in matches)}
    return {key: pin for key, pin in versions.items() if not key.startswith(OF_ANOTHER_BUILD)}


def renewed(text: str, freeze: str) -> str:
    """The text of the file with the versions of `pip freeze`."""
    installed = pins(freeze)
    lines = []
    for line in text.splitlines():
        pin = PIN.match(line)
        if pin is None:
            lines.append(line)
        elif canonical(pin[1]) in installed:
            name, version = pin[1], installed.pop(canonical(pin[1]))[1]
            head, comment = f"{name}=={version}", line[pin.end() :].strip()
            lines.append(f"{head:<26} {comment}" if comment else head)
    start = len(lines) - next(i for i, line in enumerate(reversed(lines)) if not line.strip() or line.startswith("#"))
    last = lines[start:] + [f"{name}=={version}" for name, version in installed.values()]
    return "\n".join([*lines[:start], *sorted(last, key=str.lower)]) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text(encoding="utf-8"), sys.stdin.read()), encoding="utf-8")
