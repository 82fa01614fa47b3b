"""The rest of any network: what it makes of other features at one of its layers.

    outputs, forward = record(model, "resnet.encoder.stages.2", pixel_values)
    others = forward.replay(forward.features * mask)               # the layers after that one, with gradients
    others = forward.replay(forward.features * mask, frozen=True)  # gradients reach the features alone

A network is not cut in two, since every architecture has its own code between the layers. Its forward runs again, in
which the layer returns the given features without computing anything, and so do the modules beside it, and beside the
modules that hold it, that had ended before it did: they return what they returned. What is left is the work after the
layer, and the little that a forward does between its modules. Replayed with its own features, a network without
dropout returns the same logits bit by bit. The file imports torch and its neighbour alone; it is saved beside the
networks that use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .suppression import frozen_call, no_checkpoints


@dataclass
class Forward:
    """A forward of a network, from which `replay` goes on; `record` makes it."""

    model: nn.Module
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: dict[nn.Module, list[Any]]
    """What modules returned, call by call, until the layer did."""

    @property
    def features(self) -> Tensor:
        """What the layer returned; its first tensor, if it returned several."""
        found = self.returned[self.layer][0]
        return found if isinstance(found, Tensor) else next(iter(_values(found)))

    def replay(self, features: Tensor, *, frozen: bool = False) -> Any:
        """What the network returns if its layer gives other features; no buffer changes, such as means of batch norm.

        Args:
            features: They take the place of `features`, whose shape they have.
            frozen: Whether parameters are constants, as in `frozen_call`.

        Returns:
            The outputs of the network.
        """
        with self._given(features, frozen):
            if frozen:
                return frozen_call(self.model, *self.args, **self.kwargs)
            buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
            with no_checkpoints(self.model):
                return torch.func.functional_call(self.model, buffers, self.args, self.kwargs)

    @contextmanager
    def _given(self, features: Tensor, frozen: bool) -> Iterator[None]:
        """Modules that ended before return what they did, then compute again; the layer returns the features."""
        earlier = {module: module.__dict__.get("forward") for module in self.returned}
        for module, calls in self.returned.items():
            left = [_constant(x) for x in calls] if frozen else list(calls)
            if module is self.layer:
                left = [_replaced(left[0], features)]
            if left:
                module.forward = _in_turn(left, module.forward)
        try:
            yield
        finally:
            for module, forward in earlier.items():
                module.__dict__.pop("forward", None)
                if forward is not None:  # another library's, such as the hooks of accelerate
                    module.forward = forward


def record(model: nn.Module, layer: str, *args: Any, **kwargs: Any) -> tuple[Any, Forward]:
    """Run a network, and keep what its layers return up to one of them.

    Args:
        model: The network.
        layer: The name of one of its modules, which runs once in a forward.
        *args: The inputs of the network.
        **kwargs: Its inputs by name.

    Returns:
        The outputs, and the forward.

    Raises:
        ValueError: There is no such module, or it does not run once.
    """
    try:
        target = model.get_submodule(layer)
    except AttributeError as error:
        raise ValueError(f"layer is {layer!r}: {error}; choose a name of model.named_modules()") from error
    names = layer.split(".")
    holders = [model.get_submodule(".".join(names[:i])) for i in range(len(names))]
    beside = {child for holder in holders for child in holder.children() if child not in holders}
    returned: dict[nn.Module, list[Any]] = {module: [] for module in beside}
    runs = 0

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal runs
        if not runs:
            returned[module].append(output)
        runs += module is target

    hooks = [module.register_forward_hook(keep) for module in beside]
    try:
        outputs = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if runs != 1:
        raise ValueError(f"layer is {layer!r}, which ran {runs} times: choose a module that runs once in a forward")
    return outputs, Forward(model, target, args, kwargs, returned)


def stack(model: nn.Module) -> list[str]:
    """The names of the stages or blocks of a network: of its longest list of modules among those nested least.

    Raises:
        ValueError: It has no list of two or more modules.
    """
    lists = [(name.count("."), -len(module), name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) > 1]  # fmt: skip
    if not lists:
        raise ValueError(f"layer is None, but {type(model).__name__} has no list of two or more layers: give the name of a module")
    *_, name, modules = min(lists, key=lambda x: x[:3])
    return [f"{name}.{i}" for i in range(len(modules))]


def as_grid(features: Tensor, size: tuple[int, int], special_tokens: int | None = None) -> Tensor:
    """Features as an image [B, D, h, w].

    Args:
        features: Maps [B, D, h, w]; or tokens [B, T, D], special tokens first and then those of square patches.
        size: Height and width of the image in pixels.
        special_tokens: How many tokens are special; if None, those beyond the largest grid of the image's shape.

    Returns:
        The features of patches.

    Raises:
        ValueError: The features have another number of dimensions, or no grid of the image's shape fits.
    """
    if features.ndim == 4:
        return features
    if features.ndim != 3:
        raise ValueError(f"features has shape {tuple(features.shape)}: choose a layer with [B, D, h, w] or [B, T, D]")
    tokens = features.shape[1] - (special_tokens or 0)
    side = (tokens / (size[0] * size[1])) ** 0.5
    h, w = (int(edge * side + 1e-6) for edge in size)
    if not h * w or (special_tokens is not None and h * w != tokens):
        raise ValueError(f"special_tokens is {special_tokens} of {features.shape[1]} tokens: the others are no grid")
    return features[:, features.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))


def times(features: Tensor, mask: Tensor, blank: Tensor | None = None) -> Tensor:
    """F M + F0 (1 - M): what a mask keeps of features.

    Args:
        features: Maps [B, D, h, w] or tokens [B, T, D]; special tokens stay as they are.
        mask: A mask of the grid that `as_grid` makes of them [B, h, w].
        blank: What takes the place of what is erased [1, ...], of the features' shape; zeros if None.

    Returns:
        The masked features, of the features' shape.
    """
    if features.ndim == 4:
        mask = mask[:, None]
    else:
        mask = mask.flatten(1)
        ones = mask.new_ones(len(mask), features.shape[1] - mask.shape[1])
        mask = torch.cat([ones, mask], 1)[..., None]
    return features * mask if blank is None else features * mask + blank * (1 - mask)


def _in_turn(left: list[Any], forward: Any) -> Any:
    """A forward that returns each of a list, and computes once there is none left."""
    return lambda *args, **kwargs: left.pop(0) if left else forward(*args, **kwargs)


def _values(outputs: Any) -> list[Tensor]:
    """The tensors of outputs, not those nested deeper."""
    return [x for x in (outputs.values() if isinstance(outputs, dict) else outputs) if isinstance(x, Tensor)]


def _replaced(outputs: Any, features: Tensor) -> Any:
    """Outputs with other features for the first tensor."""
    if isinstance(outputs, Tensor):
        return features
    first = _values(outputs)[0]
    if isinstance(outputs, dict):
        return type(outputs)(**{name: features if x is first else x for name, x in outputs.items()})
    return type(outputs)([features if x is first else x for x in outputs])


def _constant(outputs: Any) -> Any:
    """Outputs without gradients."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    if isinstance(outputs, dict):
        return type(outputs)(**{name: _constant(x) for name, x in outputs.items()})
    if isinstance(outputs, tuple | list):
        return type(outputs)([_constant(x) for x in outputs])
    return outputs
