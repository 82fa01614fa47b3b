"""How a model's head is found: the model inside its wrappers, the linear layers that compute logits, and their tensors.

Of a model only its output embeddings are assumed. A comment at each probed attribute names the family that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops import Head, Shard
from ..ops.panels import Panels
from .output_layer import output_layer_of
from .quantized import is_stored, packed_by, stored_weight
from .trl import is_float32_forward

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


def layers_of(inner: nn.Module) -> tuple[nn.Linear, nn.Module]:
    """The head, and the layer that the model calls: the head itself, or an adapter around it.

    Raises: ValueError if there is no head, or it is not a plain linear layer.
    """
    name = type(inner).__name__
    head: Any = output_layer_of(inner)
    layer = head
    if head is None:
        raise ValueError(
            f"model is a {name}, which has no output embeddings: pass a model with a language-modeling head, or compute"
            " its loss with hf_xent.linear_cross_entropy(hidden, weight, labels)"
        )
    layer = without_fsdp(layer)
    head = within_adapters(layer)
    if not (_is_linear(head) or is_stored(head)):
        kind = type(head).__name__
        remedy = (
            "only nn.Linear heads can be streamed, so leave it unpatched, or compute its loss with"
            " hf_xent.linear_cross_entropy(hidden, weight, labels)"
        )
        if method := packed_by(head):
            kind, remedy = f"{kind} of {method}", "leave the head out of the quantization, or dequantize it"
        raise ValueError(f"model is a {name} whose head is a {kind}: {remedy}")
    return head, layer


def within_adapters(layer: Any) -> Any:
    """The linear layer inside a layer, or what else is inside its adapters."""
    layer = without_fsdp(layer)
    while not _is_linear(layer) and hasattr(layer, "active_adapters"):  # PEFT: LoRA layers, modules_to_save
        saved = getattr(layer, "modules_to_save", {})
        active = [a for a in layer.active_adapters if a in saved]
        layer = saved[active[0]] if active else getattr(layer, "base_layer", None) or layer.original_module
        layer = without_fsdp(layer)
    return layer


def branches_of(layer: nn.Module, head: nn.Linear) -> list[nn.Module]:
    """The linear layers beside the head that an adapter makes its logits with."""
    others = (m for m in layer.modules() if m is not head and isinstance(m, nn.Linear) and _is_linear(m))
    return [m for m in others if m.out_features == head.out_features]


def without_fsdp(layer: Any) -> Any:
    """A layer inside FSDP's wrapper, if it has one of its own."""
    while getattr(layer, "_modules", {}).get("_fsdp_wrapped_module") is not None:
        layer = layer._modules["_fsdp_wrapped_module"]
    return layer


def _is_linear(layer: Any) -> bool:
    """Whether a layer is a product and a bias, and nothing more."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def checked_head(inner: nn.Module, is_lazy: Callable[[Any], bool]) -> nn.Linear:
    """The head, if its forward is its own or a lazy one. Raises: ValueError as `patching.head_of`."""
    name, head = type(inner).__name__, layers_of(inner)[0]
    if is_parametrized(head, "weight"):  # computed anew whenever it is read, by spectral_norm in another way each time
        return head
    weight = tensor_of(head, "weight")
    if type(weight) not in (nn.Parameter, Tensor) and not is_split(weight):
        try:
            stored = stored_weight(head)
        except ValueError as error:
            raise ValueError(f"model is a {name}: {error}") from error
        if stored is None:
            raise ValueError(
                f"model is a {name} whose head's weight is a {type(weight).__name__}: only plain weights and those"
                " of bitsandbytes and torchao can be streamed, leave the head out of the quantization"
            )
    forward = head.__dict__.get("forward")
    known = forward is None or is_lazy(forward) or is_float32_forward(forward)
    if not (known or hasattr(head, "_hf_hook") or is_split(weight)):
        raise ValueError(f"the head of {name} already has another forward ({forward!r}): remove that wrapper first")
    return head


def tensor_of(layer: nn.Module, name: str) -> Any:
    """A layer's weight or bias, as it is now: ZeRO-3 gathers a parameter that is read as an attribute in a forward."""
    parameter = next((x for key, x in layer.named_parameters(recurse=False) if key == name), None)
    return getattr(layer, name, None) if parameter is None else parameter


def is_split(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "placements")


def local_head(linear: nn.Linear) -> Head:
    """The head over this rank's tensors.

    Raises: ValueError if it is split, but not by vocabulary along one dimension of the mesh.
    """
    weight: Any = linear.weight
    bias: Any = linear.bias
    if not is_split(weight):
        stored = None if type(weight) in (nn.Parameter, Tensor) else stored_weight(linear)
        return Head(weight if stored is None else Panels.of(stored), bias)
    split = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not split:
        return Head(weight.to_local(), None if bias is None else bias.to_local())
    if len(split) != 1 or not weight.placements[split[0]].is_shard(0):
        mesh = tuple(weight.device_mesh.shape)
        raise ValueError(
            f"weight of the head has placements {tuple(weight.placements)} over a mesh of {mesh} ranks: only a"
            " head that is split by the vocabulary along one dimension can be streamed, so use Shard(0) there"
            " ('colwise' in a tp_plan), or unpatch the model"
        )
    shard = Shard(weight.device_mesh.get_group(split[0]), 0, weight.shape[0])
    shard = replace(shard, start=weight.device_mesh.get_local_rank(split[0]) * shard.width)
    return Head(weight.to_local(), None if bias is None else bias.to_local(), shard=shard)


def keep_weight(linear: nn.Linear) -> None:
    """Make FSDP2 keep a head's weight until the backward, which comes next and would gather it again."""
    keep: Any = getattr(linear, "set_reshard_after_forward", None)
    if keep is not None:  # sharded on its own
        keep(False, recurse=False)


def is_freed(layer: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 or accelerate's offloading frees a layer's weight after each call."""
    hook: Any = getattr(layer, "_hf_hook", None)
    offloads = any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))
    return offloads or any(hasattr(parameter, "ds_id") for parameter in layer.parameters(recurse=False))
