"""Models and their tokenizers by name: a packaged model, the folder of a checkpoint, or a Hub id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..system.access import refusal
from .packaged import DEFAULT, PACKAGED, checkpoint


def load(model: str = DEFAULT, dtype: Any = "auto", *, as_saved: bool = False) -> tuple[Any, Any]:
    """A causal LM and its tokenizer.

    Args:
        model: A packaged model's name (`packaged.PACKAGED`), a checkpoint's folder, or a Hub id.
        dtype: As in transformers' `from_pretrained`; 'auto' is the dtype the weights were saved in.
        as_saved: Whether to load the class that the checkpoint was saved from, if it is one of transformers' (such as
            `T5ForConditionalGeneration`), and not a causal LM.

    Returns:
        The model, in evaluation mode as transformers loads it, and the tokenizer beside it.

    Raises:
        ImportError: The package of a packaged model is missing; the message has the command that installs it.
        ValueError: If there is no such model, its weights are broken, or no tokenizer is beside it.
    """
    from transformers import AutoModelForCausalLM  # imported here: it takes seconds

    with explain_load_errors(model) as source:
        loader = (_saved_class(source) if as_saved else None) or AutoModelForCausalLM
        loaded = loader.from_pretrained(source, dtype=dtype)
    return loaded, tokenizer_of(model)


def tokenizer_of(model: str) -> Any:
    """The tokenizer beside a model. Raises: ValueError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(model))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up for GPT-2
            raise ValueError("it has no tokens")
        return tokenizer
    except (OSError, ValueError) as error:
        if (told := refusal(error)) is not None:
            raise ValueError(f"model is {model!r}, and its tokenizer cannot be had: {told}") from error
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model is {model!r}, and no tokenizer beside it loads ({reason}): save one there") from error


def _saved_class(source: str) -> Any:
    """The class of transformers that a checkpoint names in its configuration, or None."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    return getattr(transformers, (config.architectures or [""])[0], None)


def resolve(model: str) -> str:
    """The argument for `from_pretrained`: the folder of a packaged model, or any other path or Hub id unchanged."""
    return str(checkpoint(model)) if model in PACKAGED else model


@contextmanager
def explain_load_errors(model: str) -> Iterator[str]:
    """A context with the result of `resolve`; errors for a missing model or broken weights become ValueErrors."""
    from safetensors import SafetensorError

    source = resolve(model)
    path = Path(source)
    if not model.strip() or path.is_file():
        state = "a file" if model.strip() else "empty"
        raise ValueError(f"model is {model!r}, which is {state}: give the folder of a checkpoint, or a Hub id")
    try:
        yield source
    except SafetensorError as error:
        raise ValueError(f"model is {model!r}, whose weights are damaged ({error}): get them again") from error
    except OSError as error:
        if path.exists():
            raise
        reason = refusal(error) or str(error).strip().split("\n")[0]
        raise ValueError(f"model is {model!r}: no local folder, and the Hub cannot provide it ({reason})") from error
    except ValueError as error:  # its message lists every configuration that the class of transformers knows
        kind = re.search(r"Unrecognized configuration class.*\.(\w+)Config'?>.*AutoModel: (\w+)", str(error))
        if kind is None:
            raise
        raise ValueError(f"model is {model!r}, a {kind[1]}, which is no {kind[2]}: choose another model") from error
