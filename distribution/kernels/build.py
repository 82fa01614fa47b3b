"""Write the kernel repository of hf_xent, as `kernels` loads it: `python distribution/kernels/build.py OUT`.

The files are those of hf_xent that need torch alone, unchanged but for the namespace of their operators: `kernels` may
load several versions into one process, so that the namespace has to be this version's own. There is one folder a
backend, with the same files; it is named as kernel-builder names those without compiled code.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "hf_xent"
COPIED = (
    *("ops/**/*.py", "losses/*.py", "options/*.py", "registry.py"),
    *("system/__init__.py", "system/renamed.py"),  # `ops.algebra` and `registry` know earlier names
)
NAMESPACE = re.compile(r'\bhf_xent(?=::)|(?<=torch\.ops\.)hf_xent\b|(?<=Library\(")hf_xent(?=")')
"""Where files name the namespace of their operators, and not the package."""
COMPATIBLE = '''"""For releases of `kernels` that look for the package one folder below: the same names."""

import importlib.util
import sys
from pathlib import Path

_name = f"{__name__}_above"
_spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
_module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({name: getattr(_module, name) for name in __all__})
'''


def sources() -> dict[str, str]:
    """The files of the package by their paths in it, with the namespace of hf_xent."""
    found = {path.name: path for path in (HERE / "package").glob("*.py")}
    found |= {path.relative_to(PACKAGE).as_posix(): path for pattern in COPIED for path in PACKAGE.glob(pattern)}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(found.items())}


def build(out: Path) -> Path:
    """Write the repository into a folder that does not exist yet, and return it. Raises: ValueError if there is one."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT is {out}, which is there already: choose another folder, or remove it")
    general = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    files = sources()
    for backend in general["backends"]:
        _write_variant(out / "build" / f"torch-{backend}", files, general, backend)
    for path in (HERE / "README.md", HERE / "build.toml", PACKAGE.parent / "LICENSE"):
        shutil.copy(path, out / path.name)
    return out


def _write_variant(folder: Path, files: dict[str, str], general: dict, backend: str) -> None:
    module = general["name"].replace("-", "_")
    identifier = f"_{module}_{backend}_{_hash(json.dumps(files).encode()).hex()[:10]}"
    written = {name: NAMESPACE.sub(identifier, text) for name, text in files.items()}
    written[f"{module}/__init__.py"] = COMPATIBLE
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    digests = {name: base64.b64encode(_hash(text.encode())).decode() for name, text in sorted(written.items())}
    metadata = {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "upstream": general["upstream"],
        "python-depends": [],  # torch is there, and brings Triton where there is one
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    try:
        print(build(parser.parse_args().out))
    except ValueError as error:
        parser.error(str(error))
