"""LLaMA-Factory's training with a patched model, as an entry script of a few lines.

    # train_xent.py
    from hf_xent.integrations import llamafactory
    if __name__ == "__main__":
        llamafactory.run(loss="focal:gamma=2")

`python train_xent.py sft.yaml` takes what `llamafactory-cli train` takes; on several GPUs, `torchrun` starts it.

Data: what LLaMA-Factory trains on, in its stages pt, sft, dpo and kto. Written for LLaMA-Factory 0.9.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..callbacks.patching import PatchCallback
from ..losses.base import Loss

STAGES = ("pt", "sft", "dpo", "kto")
OTHERS = {
    "enable_liger_kernel": "Liger's kernels compute the loss",
    "use_unsloth": "unsloth's kernels compute the loss",
    "use_dft_loss": "the loss is computed from logits outside of the model",
    "use_eaft_loss": "the loss is computed from logits outside of the model",
    "use_asft_loss": "the loss is computed from logits outside of the model",
    "use_mca": "the model is Megatron's",
    "use_hyper_parallel": "the model is HyperParallel's",
}
"""Options of LLaMA-Factory that also decide how the loss is computed -> what they do."""


def run(args: Mapping[str, Any] | Sequence[str] | None = None, loss: str | Loss | None = None, **options: Any) -> None:
    """Train as `llamafactory-cli train` does, the model patched for as long as it trains.

    Args:
        args: LLaMA-Factory's options, or its command line; by default that of the script, where a YAML or JSON file may
            come first.
        loss: A registry name or a loss, as for `hf_xent.patch`; cross-entropy if it is left out.
        **options: Those of `hf_xent.patch`.

    Raises:
        ValueError: Another option of LLaMA-Factory computes the loss as well, or its stage trains no patched model.
    """
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    given = read_args(args)
    check(given if isinstance(given, Mapping) else _pairs(given))
    run_exp(given, callbacks=[PatchCallback(loss, **options)])


def check(options: Mapping[str, Any]) -> None:
    """Refuse options of LLaMA-Factory beside which a patch cannot take effect.

    Args:
        options: Its options by name.

    Raises:
        ValueError: As in `run`.
    """
    stage = options.get("stage", "sft")
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, without a loss of a language model's head: choose {', '.join(STAGES)}")
    for name, cause in OTHERS.items():
        if str(options.get(name, False)).lower() not in ("false", "0", "none", ""):
            raise ValueError(f"{name} is {options[name]}: {cause}, so that hf_xent has no effect: set {name}: false")


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """A command line's options by name; those without a value are true."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].replace("-", "_").partition("=")
            found[name] = value if equals else "true"
        elif name:
            found[name], name = word, ""
    return found
