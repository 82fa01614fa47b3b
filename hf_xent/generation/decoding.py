"""What the decoding methods of this room share: options of `generate` that they refuse, and their repositories.

A method decides alone which tokens may be sampled. `settled` switches every other option that decides it off in the
model's generation configuration, and refuses it as an argument; `reduced` keeps `generate` from taking it up again.

This file imports nothing of hf_xent: it goes with a method into its `custom_generate` repository (`written`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

NEUTRAL = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
NEUTRAL |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Options under which `generate` itself truncates nothing."""
LENGTH = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings")
RUNNING = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config"),
    *("disable_compile", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    "return_dict_in_generate",
)
BEFORE = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "guidance_scale", "exponential_decay_length_penalty"),
    *("renormalize_logits", "token_healing"),
)
"""Options that change the model's scores before Mirostat, which holds the surprise under the changed scores."""
OTHERS = ("assistant_model", "assistant_tokenizer", "custom_generate")  # arguments of `generate` that draw tokens
KEPT = (*LENGTH, *RUNNING, *BEFORE)
"""Options that a method leaves as they are."""


@contextmanager
def reduced(config: GenerationConfig, kept: Iterable[str]) -> Iterator[None]:
    """Sets all fields but `kept` to None until the context ends: `generate` falls back to them for missing options."""
    before = dict(vars(config))
    unchanged = {*kept, "transformers_version"}
    vars(config).update({name: None for name in before if name not in unchanged and not name.startswith("_")})
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def settled(
    model: Any, method: str, options: dict[str, Any], allowed: Iterable[str] = ()
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation configuration under which a method alone decides which tokens are sampled.

    Args:
        model: The model that will generate; its own configuration is not changed.
        method: The name of the method, for errors.
        options: The arguments of a call of `generate`, less those of the method; it is emptied of what is refused.
        allowed: Names that the method can take all the same, as arguments or in a `generation_config` among them.

    Returns:
        The configuration with the arguments in it, and the arguments that no configuration knows.

    Raises:
        ValueError: An option samples tokens in another way.
    """
    explicit, default = options.pop("generation_config", None), model.generation_config
    config = deepcopy(explicit or default)
    sampling = [
        name for name in vars(config) if name not in (*KEPT, *NEUTRAL, "transformers_version") and name[0] != "_"
    ]
    granted: dict[str, Any] = {}
    for name in (*NEUTRAL, *OTHERS, *sampling):
        value = options.pop(name, None)
        if value is None and explicit is not None and name not in OTHERS:
            value = vars(explicit).get(name)
            value = None if value == vars(default).get(name) else value
        is_neutral = value == NEUTRAL[name] if name in NEUTRAL else value is False
        if name in allowed:
            granted |= {} if value is None else {name: value}
        elif value is not None and not is_neutral:
            raise ValueError(f"{name} is given, but {method} alone decides which tokens may be sampled: leave it out")
    if "paged" in (options.get("cache_implementation"), config.cache_implementation):
        raise ValueError("cache_implementation is 'paged', which samples tokens in its own batches: choose another")
    vars(config).update(dict.fromkeys(sampling))
    return config, config.update(**options, **NEUTRAL, **granted)


def written(folder: str | Path, module: str | Path, card: str, beside: Iterable[str] = ()) -> Path:
    """Writes a `custom_generate` repository for the Hub.

    Args:
        folder: The folder to write; it is made if it does not exist.
        module: The file of the method, which has a function `generate`; besides libraries it imports this file alone,
            and those in `beside`.
        card: The text of its README.md.
        beside: Names of files in the module's folder that go with it.

    Returns:
        The folder.
    """
    folder = Path(folder)
    code = folder / "custom_generate"
    code.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(module, code / "generate.py")
    shutil.copyfile(__file__, code / "decoding.py")
    for name in beside:
        shutil.copyfile(Path(module).with_name(name), code / name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder
