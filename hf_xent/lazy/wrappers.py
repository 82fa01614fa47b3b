"""What training wrappers put on the outputs of a model, so that they notice where the backward begins.

FSDP and DeepSpeed register hooks on the outputs' gradients; DeepSpeed, and DDP with `find_unused_parameters`, pass the
outputs (DDP copies of them) through an autograd function that returns gradients unchanged. Lazy logits never get a
gradient: whatever is computed from them afterwards gets these hooks instead. They only gather weights, set states and
scale by a number, so that they are right there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .source import map_tensors

Hook = Callable[[Tensor], Any]
_LIBRARIES = ("torch.distributed.", "deepspeed.")
_OF_FUNCTIONS = ("torch.nn.parallel.distributed", "deepspeed.")


def is_of_wrapper(hook: Any) -> bool:
    """Whether a hook is one of a training wrapper."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(_LIBRARIES)


def pass_through(node: Any) -> Hook | None:
    """The backward of a wrapper's autograd function as a hook; None for other nodes of the graph."""
    function = getattr(node, "_forward_cls", None)
    if not str(getattr(function, "__module__", "")).startswith(_OF_FUNCTIONS):
        return None

    def hook(gradient: Tensor) -> Tensor:
        found = node.apply(gradient)
        # DDP's has no gradient for its first argument, which is no tensor
        return next(x for x in found if x is not None) if isinstance(found, tuple) else found

    return hook


def hooked(hooks: list[Hook], result: Any) -> Any:
    """The results of a computation from lazy logits with these hooks on their gradients."""

    def change(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        x = x.view_as(x)  # so that these run before the hooks that are on the result already
        for hook in hooks:
            x.register_hook(hook)
        return x

    return map_tensors(change, result) if hooks else result
