"""What `patch` installs on a model and how it is removed: hooks, forwards, the objective, what they replaced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..lazy import PatchState
from .calls import ModelLoss
from .forwards import OwnForward
from .gathered import unit_of
from .heads import branches_of, checked_head, inner_of, layers_of
from .hooks import LazyForward, after_forward, before_forward, is_lazy, is_noticing, noticing_forward, wraps_noticing
from .products import LazyProducts
from .trl import FusedHead, is_float32_forward


@dataclass
class Installation:
    """The patch, which a model keeps as an attribute. A replica has its own, with the same state."""

    state: PatchState
    objective: ModelLoss | None = None
    loss_function: Any = None  # the one that the user had set before, or None
    previous_forward: Any = None  # the forward that was on the model's instance, or None
    keepers: tuple[nn.Module, ...] = ()  # wrappers that store the model's forward as theirs
    hooks: tuple[Any, ...] = ()
    lazy_forwards: list[OwnForward] = field(default_factory=list)
    fused: FusedHead | None = None  # TRL's, after a trainer has installed it
    traced: bool = False  # whether the head has to return lazy logits to the program that torch.compile traces now

    @property
    def always(self) -> int:
        """How many callers need lazy logits without labels."""
        return self.state.always

    def install(self, model: nn.Module) -> None:
        """Patch a model that has no patch."""
        inner = inner_of(model)
        self.make_heads_lazy(inner)
        self.take_over_fused_head(inner)
        forward: Any = inner.__dict__.get("forward")
        self.previous_forward = None if is_noticing(forward) or wraps_noticing(forward) else forward
        original = MethodType(type(inner).forward, inner)
        self.keepers = tuple(m for m in model.modules() if m is not inner and m.__dict__.get("forward") == original)
        self.set_forward(inner)
        first = inner.register_forward_pre_hook(before_forward, with_kwargs=True)
        self.hooks = (first, inner.register_forward_hook(after_forward, always_call=True))
        inner.__dict__["_hf_xent"] = self
        if self.objective is not None:
            from transformers.loss.loss_utils import ForMaskedLMLoss  # here, since the import takes seconds

            self.loss_function = inner.__dict__.get("_loss_function")
            model_class: Any = type(inner)  # of transformers, so it has the property
            self.objective.next_token = inner.loss_function is not ForMaskedLMLoss
            model_class.loss_function.fset(inner, self.objective)  # nn.Module.__setattr__ would shadow the property

    def remove(self, inner: Any) -> None:
        """Leave a model as it was before `install`."""
        attributes = inner.__dict__
        for name in ("_hf_xent", "_replicate_for_data_parallel"):
            del attributes[name]
        for handle in self.hooks:
            handle.remove()
        self.restore_heads()
        for slot in ("forward", "_old_forward"):  # the second if accelerate wrapped the model later
            if is_noticing(attributes.get(slot)):
                del attributes[slot]
                if self.previous_forward is not None or slot == "_old_forward":
                    attributes[slot] = self.previous_forward or MethodType(type(inner).forward, inner)
        for keeper in self.keepers:
            keeper.__dict__["forward"] = MethodType(type(inner).forward, inner)
        if self.fused is not None:
            self.fused.restore(inner, self.previous_forward)
        if self.objective is not None and inner._modules.get("_loss_function") is self.objective:
            del inner._loss_function
            if self.loss_function is not None:
                inner.loss_function = self.loss_function

    def set_forward(self, inner: nn.Module) -> None:
        """Give the instance a forward that notices calls, for callers that bypass the hooks.

        These are PEFT's AdaLoRA, X-LoRA and adaption prompts (which store the forward they find), and older PEFT.
        """
        forward = MethodType(noticing_forward(type(inner)), inner)
        noticed = wraps_noticing(inner.__dict__.get("forward"))
        for module in self.keepers if noticed else (inner, *self.keepers):
            module.__dict__["forward"] = forward
        inner.__dict__["_replicate_for_data_parallel"] = MethodType(_replicate_for_data_parallel, inner)

    def make_heads_lazy(self, inner: nn.Module) -> None:
        """Put lazy forwards on the head as it is now: adapters, wrappers or a resize may have replaced it."""
        head, layer = layers_of(inner)
        parametrized = is_parametrized(head, "weight")
        places: list[tuple[Any, nn.Module]] = [] if parametrized else [(LazyForward, head)]
        if parametrized or layer is not head:
            places.append((LazyProducts, layer))
            places += [(LazyForward, m) for m in branches_of(layer, head) if unit_of(inner, m) is not None]
        same = [(type(forward), forward.layer) for forward in self.lazy_forwards] == places
        if not same or is_float32_forward(head.__dict__.get("forward")):  # which TRL has put on the head since
            checked_head(inner, is_lazy)  # raises an error if it cannot be streamed
            self.restore_heads()
            self.lazy_forwards = [kind(module, self) for kind, module in places]
        for forward in self.lazy_forwards:
            forward.gather_in(inner)

    def restore_heads(self) -> None:
        """Put back the heads' own forwards."""
        for forward in self.lazy_forwards:
            forward.remove()
        self.lazy_forwards = []

    def take_over_fused_head(self, inner: nn.Module) -> None:
        """Take TRL's forward off the model, if there is one: in a copy of the model it would run the original."""
        self.fused = FusedHead.installed(inner) or self.fused
        if self.fused is not None:
            FusedHead.remove(inner)
        bound = getattr(inner.__dict__.get("forward"), "__func__", None)
        if "_hf_xent" in inner.__dict__ and bound in (None, type(inner).forward):  # an unpickled model has the latter
            self.set_forward(inner)


def _replicate_for_data_parallel(self: Any) -> Any:
    """The replica that `nn.Module` makes, with its own patch, since it runs in its own thread and has its own head."""
    replica = type(self)._replicate_for_data_parallel(self)
    installation: Installation = self.__dict__["_hf_xent"]
    previous = installation.previous_forward
    if getattr(previous, "__self__", None) is self:
        previous = MethodType(previous.__func__, replica)
    # the replica has no head yet, and gets its lazy forwards once it has one
    replicated = replace(installation, previous_forward=previous, keepers=(), lazy_forwards=[])
    replica.__dict__["_hf_xent"] = replicated
    replicated.set_forward(replica)
    return replica


def installation_of(inner: nn.Module) -> Installation | None:
    """The installation of `patch` on a model without wrappers, or None."""
    return inner.__dict__.get("_hf_xent")
