"""The inputs of a benchmark: hidden states, a head and next-token labels, from a real model or generated.

Real ones come from a model, or from a file that `write_activations` wrote on another machine. Generated ones are
'calibrated' to a real model's softmax, or 'random': uniform labels, and probabilities far below any gradient filter's
threshold.

The truth is torch's loss with its gradients, in float64 for float32 inputs where that is affordable (float32
otherwise). It is computed in chunks of rows, and saved once for all contestants.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..data import DATASETS, load_text, pack
from ..models.cache import cache_folder
from ..models.loading import load
from ..models.packaged import DEFAULT
from ..system import renamed
from ..system.files import replace_atomically
from .calibrated import DEFAULT_LAW, check_shape, generate
from .config import CALIBRATED, DTYPES, EXPORTED, RANDOM, SHAPED, BenchConfig
from .objectives import OBJECTIVES, PLAIN
from .two_models import teacher_of

BLOCK = 512  # tokens per block of text: long enough for realistic contexts
# Floating-point operations of a float64 truth on a CPU: two minutes on two idle cores. A float32 truth cannot
# judge float32 contestants: it has the errors of dense torch, and only dense torch agrees with it.
AFFORDABLE = 1e13
TRUTH_BYTES = 256 << 20  # of logits at a time on a CPU; a GPU takes eight times as much


@dataclass(frozen=True)
class Facts:
    """The shape, dtype and source of the inputs, as tables show them."""

    N: int
    V: int
    D: int
    dtype: torch.dtype
    source: str

    @property
    def logits_bytes(self) -> int:
        """The size of dense logits [N, V]."""
        return self.N * self.V * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """The size of the head [V, D], and of its gradient."""
        return self.V * self.D * self.dtype.itemsize


def prepare(config: BenchConfig, folder: Path) -> Facts:
    """Write inputs and truth as safetensors into `folder`, for the processes of the contestants."""
    dtype = DTYPES[config.dtype]
    tensors, source = _source(config)
    hidden, weight, labels = tensors["hidden"].to(dtype), tensors["weight"].to(dtype), tensors["labels"]
    save_file({"hidden": hidden, "weight": weight, "labels": labels}, folder / "inputs.safetensors")
    found = truth(hidden, weight, labels, config.device, config.objective)
    save_file({name: x.cpu() for name, x in found.items()}, folder / "truth.safetensors")
    return Facts(len(hidden), len(weight), weight.shape[1], dtype, source)


def shaped_facts(config: BenchConfig) -> Facts | None:
    """The facts of inputs of a chosen shape, before they are drawn; None for those of a model.

    Raises:
        ValueError: If they cannot be drawn.
    """
    kind, _, like = config.model.partition(":")
    if kind not in SHAPED:
        return None
    if kind == CALIBRATED:
        check_shape(config.width, like or DEFAULT_LAW)
    source = f"{CALIBRATED} to {like or DEFAULT_LAW}" if kind == CALIBRATED else RANDOM
    return Facts(config.tokens, config.vocab, config.width, DTYPES[config.dtype], source)


def on_device(config: BenchConfig) -> tuple[dict[str, Tensor], Facts]:
    """The tensors hidden, weight and labels on the config's device and in its dtype, and their facts; no file is made.

    Random and calibrated inputs are drawn on the device.
    """
    dtype = DTYPES[config.dtype]
    tensors, source = _source(config)
    cast = {name: x.to(config.device, None if name == "labels" else dtype) for name, x in tensors.items()}
    V, D = cast["weight"].shape
    return cast, Facts(len(cast["hidden"]), V, D, dtype, source)


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, device: str, objective: str = PLAIN) -> dict[str, Tensor]:
    """Loss and gradients of hidden and weight in float32 on the device, from torch in the widest affordable dtype."""
    N, (V, D) = len(hidden), weight.shape
    affordable = device != "cpu" or 6 * N * V * D <= AFFORDABLE
    dtype = torch.float64 if hidden.dtype == torch.float32 and affordable else torch.float32
    other = teacher_of(hidden).to(device, dtype)
    hidden, weight = (x.detach().to(device, dtype).requires_grad_() for x in (hidden, weight))
    labels, total = labels.to(device), torch.zeros((), device=device, dtype=dtype)
    rows = max(1, (TRUTH_BYTES if device == "cpu" else 8 * TRUTH_BYTES) // (V * dtype.itemsize))
    for h, y, t in zip(hidden.split(rows), labels.split(rows), other.split(rows), strict=True):
        second = (F.linear(t, weight.detach()),) if OBJECTIVES[objective].with_teacher else ()
        loss = OBJECTIVES[objective].on_logits(F.linear(h, weight), y, *second).sum() / N
        loss.backward()
        total += loss.detach()
    assert hidden.grad is not None and weight.grad is not None
    results = {"loss": total, "hidden": hidden.grad, "weight": weight.grad}
    return {name: x.float().contiguous() for name, x in results.items()}


def _source(config: BenchConfig) -> tuple[dict[str, Tensor], str]:
    """The float32 tensors hidden and weight, the labels, and the name of their source in tables."""
    kind, _, like = config.model.partition(":")
    if config.model == RANDOM:
        return _random(config.tokens, config.vocab, config.width, config.device), RANDOM
    if kind == CALIBRATED:
        like = like or DEFAULT_LAW
        tensors = generate(config.tokens, config.vocab, config.width, like, device=config.device)
        return dict(zip(("hidden", "weight", "labels"), tensors, strict=True)), f"{CALIBRATED} to {like}"
    if config.model.endswith(EXPORTED):
        return read_activations(Path(config.model), config.tokens)
    return activations(config), f"{_shown(config.model)} on {_shown(config.data)}"


def _shown(name: str) -> str:
    """The name of a file or folder without its place on this machine; a name or Hub id as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def _random(N: int, V: int, D: int, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device=device)
    weight = torch.randn(V, D, generator=generator, device=device) * D**-0.5
    labels = torch.randint(V, (N,), generator=generator, device=device)
    return {"hidden": hidden, "weight": weight, "labels": labels}


def activations(config: BenchConfig) -> dict[str, Tensor]:
    """float32 tensors of the first `tokens` positions; cached for the packaged model, which cannot change."""
    if config.model != DEFAULT or config.data not in DATASETS:
        return collect(config)
    # the text of pydoc depends on the version of Python
    name = f"{config.model}-{config.data}-python{platform.python_version()}"
    path = cache_folder() / "bench" / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.safetensors"
    tensors = load_file(path) if path.is_file() else None
    if tensors is None or len(tensors["labels"]) < config.tokens:
        tensors = collect(config)
        replace_atomically(path, partial(save_file, tensors))  # another run may be reading the file
    return {name: x if name == "weight" else x[: config.tokens].clone() for name, x in tensors.items()}


@torch.no_grad()
def collect(config: BenchConfig) -> dict[str, Tensor]:
    """Collect the hidden states that enter the head of a model on a text, the weight of the head, and the next tokens.

    The head's bias, scale and softcap are left out: every contestant computes the plain loss of `hidden @ weight.T`.

    Returns:
        `hidden` [N, D] and `weight` [V, D] in float32, `labels` [N], on the CPU.

    Raises:
        ValueError: If the model has no output head, or the text has fewer positions than `config.tokens`.
    """
    model, tokenizer = load(config.model, dtype="float32")
    head = model.eval().to(config.device).get_output_embeddings()
    if head is None:
        raise ValueError(f"{config.model} has no output head: name a causal language model")
    blocks = pack(load_text(config.data), tokenizer, BLOCK)
    states: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: states.append(args[0][0, :-1].float().cpu()))
    labels: list[Tensor] = []
    for block in blocks:
        ids = torch.tensor(block["input_ids"])
        model(input_ids=ids[None].to(config.device), use_cache=False)
        labels.append(ids[1:])
        if sum(map(len, labels)) >= config.tokens:
            break
    hook.remove()
    if sum(map(len, labels)) < config.tokens:
        raise ValueError(f"{config.data} has {sum(map(len, labels))} positions with a next token: ask for fewer tokens")
    hidden, targets = torch.cat(states)[: config.tokens], torch.cat(labels)[: config.tokens]
    return {"hidden": hidden.contiguous(), "weight": head.weight.detach().float().cpu().contiguous(), "labels": targets}


def write_activations(config: BenchConfig, path: Path) -> None:
    """Write real activations to a small file, which `BenchConfig(model=path)` reads on machines without the model.

    The head is written as int8 with a scale for each row, hidden states as float16. int8 moves the tail curves of
    SmolLM2 and Gemma by less than 1 %. The model's license applies to the file.

    Args:
        config: Names the model, the text and the number of tokens.
        path: The file, whose name ends in .safetensors.

    Raises:
        ValueError: If the name has another ending, or hidden states are beyond the range of float16.
    """
    if path.suffix != EXPORTED:
        raise ValueError(f"output is {str(path)!r}: give a name that ends in {EXPORTED}")
    tensors, source = _source(config)
    scale = tensors["weight"].abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    hidden = tensors["hidden"].half()
    if not hidden.isfinite().all():
        raise ValueError(f"hidden states of {config.model} are beyond the range of float16")
    weight = (tensors["weight"] / scale[:, None]).round().to(torch.int8)
    quantized = {"hidden": hidden, "weight": weight, "scale": scale, "labels": tensors["labels"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(quantized, path, metadata={"source": f"{source}, int8 head"})


def read_activations(path: Path, tokens: int) -> tuple[dict[str, Tensor], str]:
    """Read a file that `write_activations` wrote.

    Args:
        path: The file.
        tokens: How many positions are read, from the first.

    Returns:
        `hidden` [N, D] and `weight` [V, D] dequantized to float32, `labels` [N]; and the name of their source.

    Raises:
        ValueError: If the file is incomplete, holds something else, or has fewer positions.
    """
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete file ({error}): make it with `hf-xent bench --export FILE`"
        ) from error
    with opened as file:
        source = (file.metadata() or {}).get("source")
        if source is None or set(file.keys()) != {"hidden", "weight", "scale", "labels"}:
            raise ValueError(f"{path} holds no exported activations: make it with `hf-xent bench --export FILE`")
        hidden, weight, scale, labels = (file.get_tensor(name) for name in ("hidden", "weight", "scale", "labels"))
    if len(labels) < tokens:
        raise ValueError(f"{path} has {len(labels)} positions: ask for fewer tokens")
    return {"hidden": hidden[:tokens].float(), "weight": weight * scale[:, None], "labels": labels[:tokens]}, source


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
