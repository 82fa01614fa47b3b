"""What a classifier's training keeps beside the model: the state of its loss, and a second model that is an average.

Both are in checkpoints, so that a resumed run is the same run, and in none of the model's own files: a loss trains its
projection or remembers its minimum as a module within the model, whose entries the model does not save.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from .epoch_teacher import EpochTeacher

ATTRIBUTE = "hf_xent_loss_state"
FILE = "loss_state.safetensors"


def attach(model: nn.Module, state: nn.Module | None, like: torch.Tensor) -> nn.Module | None:
    """Makes the state of a loss a part of a model, on the device of a tensor, and returns it; one it had is removed."""
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)
    if state is None:
        return None
    model.add_module(ATTRIBUTE, state.to(like.device))
    if hasattr(model, "_keys_to_ignore_on_save"):
        own = {f"{ATTRIBUTE}.{name}" for name in state.state_dict()}
        ignored: Any = model._keys_to_ignore_on_save
        setattr(model, "_keys_to_ignore_on_save", {*(ignored or ()), *own})  # noqa: B010  # known to no type checker
    return state


def average_over_ranks(model: nn.Module, state: nn.Module) -> None:
    """Lets a state's gradients be means over all processes, which data parallelism cannot do by itself.

    Its parameters are used after the model's forward, so that DDP would take them for unused ones. They are left out of
    it, and averaged where their gradients are. An accumulated gradient is the same on all ranks before the next part is
    added, so the mean of the sums is the sum of the means.
    """
    names = [f"{ATTRIBUTE}.{name}" for name, _ in state.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for parameter in state.parameters():
        parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def save(state: nn.Module | None, checkpoint: str) -> None:
    """Writes the state, if there is one, into the folder of a checkpoint."""
    if state is not None:
        save_model(state, str(Path(checkpoint) / FILE))


def load(state: nn.Module | None, checkpoint: str) -> None:
    """Reads the state from the folder of a checkpoint.

    Raises:
        ValueError: The checkpoint has none, but the loss has.
    """
    path = Path(checkpoint) / FILE
    if state is None:
        return
    if not path.is_file():
        raise ValueError(f"the checkpoint {checkpoint} has no {FILE}: resume one that was trained under this loss")
    load_model(state, str(path))


class AveragedTeacher(EpochTeacher):
    """The exponential moving average of a model's weights, in evaluation mode: m <- momentum m + (1 - momentum) w."""

    file = "averaged_teacher.safetensors"

    def __init__(self, momentum: float):
        self.update_ = get_ema_multi_avg_fn(momentum)

    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights of a model; buffers are those of the model."""
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        ours = dict(self.model.named_parameters())
        with torch.no_grad():
            self.update_([*ours.values()], [weights[name] for name in ours], 0)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])

    def renew(self, model: nn.Module) -> None:
        """Takes the weights of a model, which is not wrapped, without the state of its loss."""
        super().renew(model)
        if hasattr(self.model, ATTRIBUTE):
            delattr(self.model, ATTRIBUTE)


class Averaging(TrainerCallback):
    """Starts a teacher from the model when training starts, unless it was loaded, and moves it after every step."""

    def __init__(self, teacher: AveragedTeacher, model: Callable[[], nn.Module]):
        self.teacher, self.model = teacher, model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, after it has loaded a checkpoint."""
        if self.teacher.model is None:
            self.teacher.renew(self.model())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.teacher.update(self.model())
