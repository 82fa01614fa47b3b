"""Which tests pytest finds where extras are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDE = """
import importlib.machinery, os

hidden = os.environ["HIDDEN"].split(",")
real = importlib.machinery.PathFinder.find_spec.__func__

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else real(cls, name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def collect(tmp_path: Path, hidden: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pytest --collect-only` in a process that does not find some packages."""
    (tmp_path / "hide.py").write_text(HIDE)
    root = Path(__file__).parents[1]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "hide",
            "-p",
            "no:cacheprovider",
            "--collect-only",
            "-q",
            "-rs",
            *arguments,
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)]), "HIDDEN": hidden},
    )


@pytest.mark.slow
def test_gpu_tests_are_found_without_any_extra(tmp_path: Path) -> None:
    """Those of the kernels: no file is an error, and what is left out names the package it needs."""
    hidden = "accelerate,datasets,evaluate,matplotlib,peft,psutil,scipy,sklearn,trl"
    found = collect(tmp_path, hidden, "-m", "gpu")
    assert found.returncode == 0, found.stdout[-3000:]
    for file in ("test_ops.py", "test_losses.py", "test_fused.py", "test_tail.py", "test_scaling.py"):
        assert f"tests/{file}::" in found.stdout
    assert "needs peft, which is not installed" in found.stdout


def test_other_missing_modules_are_errors(tmp_path: Path) -> None:
    """A typing error, or a module of torch's that is gone, is not taken for an extra."""
    found = collect(tmp_path, "hf_xent", "tests/test_tail.py")
    assert found.returncode != 0 and "No module named 'hf_xent'" in found.stdout
    found = collect(tmp_path, "trl", "tests/test_tail.py")
    assert found.returncode == 0
