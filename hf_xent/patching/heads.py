"""How a model's head is found: the model inside its wrappers, the linear layers that compute logits, and their tensors.

Of a model only its output embeddings are assumed. A comment at each probed attribute names the family that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..ops import Head, Shard

_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod")  # the attributes in which wrappers keep the model


def inner_of(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers.

    Args:
        model: The model, wrapped or not.

    Returns:
        The innermost model.

    Raises:
        ValueError: The argument is not a module, but for instance a model's name.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: load it first, for instance by AutoModelForCausalLM.from_pretrained")
    inner: Any = model
    while True:
        wrapped = next((inner._modules[name] for name in _WRAPPED if inner._modules.get(name) is not None), None)
        if wrapped is not None:
            inner = wrapped
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            return inner


def linears_of(inner: nn.Module) -> list[nn.Linear]:
    """The head, and the second halves of LoRA branches on it, whose products have the vocabulary's size too.

    Raises: ValueError if there is no head, or it is not a plain linear layer.
    """
    name = type(inner).__name__
    get: Any = getattr(inner, "get_output_embeddings", None)  # absent on modules that are not transformers models
    head = layer = get() if get else None
    if head is None:
        raise ValueError(
            f"model is a {name}, which has no output embeddings: pass a model with a language-modeling head"
        )
    head = _without_fsdp(head)
    while not _is_linear(head) and hasattr(head, "active_adapters"):  # PEFT: LoRA layers, modules_to_save
        saved = getattr(head, "modules_to_save", {})
        active = [a for a in head.active_adapters if a in saved]
        head = saved[active[0]] if active else getattr(head, "base_layer", None) or head.original_module
        head = _without_fsdp(head)
    if not _is_linear(head):
        raise ValueError(
            f"model is a {name} whose head is a {type(head).__name__}: only plain nn.Linear heads can be streamed"
        )
    branches = map(_without_fsdp, getattr(layer, "lora_B", {}).values())
    return [head, *filter(_is_linear, branches)]


def _without_fsdp(layer: Any) -> Any:
    """A layer inside FSDP's wrapper, if it has one of its own."""
    while getattr(layer, "_modules", {}).get("_fsdp_wrapped_module") is not None:
        layer = layer._modules["_fsdp_wrapped_module"]
    return layer


def _is_linear(layer: Any) -> bool:
    """Whether a layer is a product and a bias, and nothing more."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def checked_head(inner: nn.Module, is_lazy: Callable[[Any], bool]) -> nn.Linear:
    """The head, if its forward is its own or a lazy one. Raises: ValueError as `patching.head_of`."""
    name, head = type(inner).__name__, linears_of(inner)[0]
    weight = tensor_of(head, "weight")
    if type(weight) not in (nn.Parameter, Tensor) and not is_split(weight):
        raise ValueError(
            f"model is a {name} whose head's weight is a {type(weight).__name__}: only plain weights can be"
            " streamed, leave the head out of the quantization"
        )
    forward = head.__dict__.get("forward")
    if not (forward is None or is_lazy(forward) or hasattr(head, "_hf_hook") or is_split(weight)):
        raise ValueError(f"the head of {name} already has another forward ({forward!r}): remove that wrapper first")
    return head


def tensor_of(layer: nn.Module, name: str) -> Any:
    """A layer's weight or bias, as it is now: ZeRO-3 gathers a parameter that is read as an attribute in a forward."""
    parameter = next((x for key, x in layer.named_parameters(recurse=False) if key == name), None)
    return getattr(layer, name, None) if parameter is None else parameter


def is_split(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "placements")


def local_head(linear: nn.Linear) -> Head | None:
    """The head over this rank's tensors; None if it is split, but not by vocabulary along one dimension of the mesh."""
    weight: Any = linear.weight
    bias: Any = linear.bias
    if not is_split(weight):
        return Head(weight, bias)
    split = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(split) != 1 or not weight.placements[split[0]].is_shard(0):
        return None
    shard = Shard(weight.device_mesh.get_group(split[0]), 0, weight.shape[0])
    shard = replace(shard, start=weight.device_mesh.get_local_rank(split[0]) * shard.width)
    return Head(weight.to_local(), None if bias is None else bias.to_local(), shard=shard)


def keep_weight(linear: nn.Linear) -> None:
    """Make FSDP2 keep a head's weight until the backward, which comes next and would gather it again."""
    keep: Any = getattr(linear, "set_reshard_after_forward", None)
    if keep is not None:  # sharded on its own
        keep(False, recurse=False)


def forward_slot(layer: nn.Module) -> str:
    """The attribute of a layer that has its own forward: accelerate's hooks take that one's place and call this one."""
    return "_old_forward" if hasattr(layer, "_hf_hook") else "forward"


def is_freed(layer: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 or accelerate's offloading frees a layer's weight after each call."""
    hook: Any = getattr(layer, "_hf_hook", None)
    offloads = any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))
    return offloads or hasattr(tensor_of(layer, "weight"), "ds_id")
