"""What methods share that adapt a classifier on a stream of unlabelled batches, one step of an optimizer for each.

A step is taken whole or not at all: after an error or an interruption the model is as before the step or as after it.
The model stays in evaluation mode, and its BatchNorm layers work with the statistics of the batch while it adapts:
their running statistics are neither read nor changed. Labels in a batch are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from ..classes.heads import classes_of
from ..models.contexts import eval_mode
from ..options.ranges import check_count, check_number
from ..system.files import replace_atomically
from ..system.progress import tracked
from .source import LABELS

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
State = dict[str, Any]


@dataclass(eq=False)
class Stream:
    """A model that adapts batch by batch; methods derive from it and say what is learned, and by which loss.

    Raises:
        ValueError: An option is out of its range, or the model has nothing to learn, or too few digits to learn it in.
    """

    model: Any
    """The classifier of transformers, which is changed in place."""
    _: KW_ONLY
    learning_rate: float = 1e-3
    """The step size; 0 changes nothing."""
    optimizer: str = "adam"
    """'adam', with its usual options, or 'sgd', without momentum."""
    seed: int = 0
    """Of all that is drawn; torch's global generator is not touched."""
    steps: int = field(default=0, init=False)
    """Batches of the stream so far."""
    warmed: int = field(default=0, init=False)
    """Steps of a warm-up so far."""
    file: ClassVar[str] = "stream.pt"
    """The name of the state in a folder."""

    def __post_init__(self) -> None:
        self._check_model()
        check_number(self, "learning_rate", "[0, inf)")
        check_count("seed", self.seed, 0)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}: choose {' or '.join(OPTIMIZERS)}")
        config = getattr(self.model, "config", None)
        if config is not None and not 2 <= config.num_labels == classes_of(self.model):
            raise ValueError(f"model has {config.num_labels} outputs, not one for each class: give one with a softmax")
        self.learned = self.learns()
        if not self.learned:
            raise ValueError(
                f"model is a {type(self.model).__name__} without parameters to learn: let some have gradients"
            )
        narrow = next((p.dtype for p in self.learned.values() if p.itemsize < 4), None)
        if narrow is not None:
            raise ValueError(
                f"model has parameters in {narrow}, where small steps are rounded away: load it in float32"
            )
        self.generator = torch.Generator().manual_seed(self.seed)
        self.tensors: dict[str, Tensor] = {**self.learned, **self.keeps()}
        self._optimizer = OPTIMIZERS[self.optimizer]([*self.learned.values()], lr=self.learning_rate)
        self._start = self._state()

    def _check_model(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model is {self.model!r}: load it first, for instance by AutoModelForImageClassification")

    def learns(self) -> dict[str, nn.Parameter]:
        """The parameters that are learned, by their names."""
        raise NotImplementedError

    def keeps(self) -> dict[str, Tensor]:
        """Other tensors that change in steps, such as a teacher's."""
        return {}

    def adapt(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The logits [B, K] that are returned for inputs, and the loss of the step, a scalar."""
        raise NotImplementedError

    def models(self) -> list[nn.Module]:
        """The models that read batches."""
        return [self.model]

    def after(self) -> None:
        """Called after the optimizer's step, within the step."""

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits [B, K] of a batch by the model as it was before it; then the model learns from the batch.

        Args:
            batch: The inputs of the model; labels are not read.

        Raises:
            ValueError: No rows, or a loss that is not finite; the model stays as it was.
        """
        with torch.inference_mode(False):
            inputs = self.inputs(batch)
        return self._step(lambda: self.adapt(inputs), "steps")

    def stream(self, batches: Iterable[Mapping[str, Any]], description: str = "Adapting") -> Iterator[Tensor]:
        """The logits of each batch in turn, behind a progress bar on standard error.

        A stream that was stopped goes on with the batches from number `steps` on, after `load`.
        """
        with tracked(batches, description, console=Console(stderr=True)) as bar:
            for batch in bar:
                yield self.predict(batch)

    def save(self, folder: str | Path) -> Path:
        """Writes what the stream has learned, and all it needs to go on as if it had not stopped; returns the file."""
        stored = {"settings": self.settings(), "now": self._state(), "start": self._start}
        return replace_atomically(Path(folder, self.file), lambda draft: torch.save(stored, draft))

    def load(self, folder: str | Path) -> None:
        """Goes on from what `save` wrote, in a stream with the same model and options.

        Raises:
            ValueError: No such file, or it is of other options or of another model; the stream stays as it was.
        """
        path = Path(folder, self.file)
        if not path.is_file():
            raise ValueError(f"folder is {str(folder)!r}, which has no {self.file}: give one that `save` wrote to")
        stored = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self.settings().items():
            if stored["settings"].get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}, but {path} was saved with {stored['settings'].get(name)!r}: use that"
                )
        shapes, saved = ({k: t.shape for k, t in x.items()} for x in (self.tensors, stored["now"]["tensors"]))
        if shapes != saved:
            odd = next(name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name))
            raise ValueError(f"{path} was saved from another model, which differs in {odd}: load it into its own")
        self._restore(stored["now"])
        self._start = stored["start"]

    def reset(self) -> None:
        """Goes back to where the stream began: to the model that was given, or to the end of the warm-up."""
        self._restore(self._start)

    def settings(self) -> dict[str, Any]:
        """The method and its options that are numbers or text."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"method": type(self).__name__} | {k: v for k, v in values.items() if isinstance(v, int | float | str)}

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch without labels, on the model's device, its real numbers in the model's dtype."""
        like = next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())
        found: dict[str, Any] = {}
        for name in batch:
            if name not in LABELS:
                value = batch[name]
                if isinstance(value, Tensor):
                    value = value.to(like if value.is_floating_point() else like.device)
                    value = value.clone() if value.is_inference() else value  # a graph could not keep it
                    if not len(value):
                        raise ValueError(f"batch has no rows in {name}: leave it out")
                found[name] = value
        return found

    def _step(self, forward: Callable[[], tuple[Tensor, Tensor]], counter: str) -> Tensor:
        """One step; the counter tells whether it was taken, so that whatever stops it leaves all or nothing."""
        before, draws, saved = getattr(self, counter), self.generator.get_state(), None
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                eval_mode(self.model),
                batch_statistics(self.models()),
            ):
                logits, loss = forward()
                if not torch.isfinite(loss):
                    raise ValueError(f"the batch has the loss {loss.item()}: look for nan in it, or learn more slowly")
                gradients = torch.autograd.grad(loss, [*self.learned.values()], allow_unused=True)
            saved = self._state() | {"generator": draws}
            for parameter, gradient in zip(self.learned.values(), gradients, strict=True):
                parameter.grad = gradient
            self._optimizer.step()
            self.after()
            setattr(self, counter, before + 1)
        except BaseException:
            if getattr(self, counter) == before:
                self.generator.set_state(draws)
                if saved is not None:
                    self._restore(saved)
            raise
        finally:
            self._optimizer.zero_grad()
        return logits.detach()

    def _state(self) -> State:
        """A copy of all that a step changes."""
        return {
            "tensors": {name: tensor.detach().clone() for name, tensor in self.tensors.items()},
            "optimizer": deepcopy(self._optimizer.state_dict()),
            "generator": self.generator.get_state(),
            "counts": [self.steps, self.warmed],
        }

    def _restore(self, state: State) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state["tensors"][name])
        self._optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.generator.set_state(state["generator"])
        self.steps, self.warmed = state["counts"]


@contextmanager
def batch_statistics(models: Iterable[nn.Module]) -> Iterator[None]:
    """While it is open, BatchNorm layers in evaluation mode use the statistics of their batch, not the running ones.

    Raises:
        ValueError: A batch of one row has one value for a channel.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    layers = [(m, m.running_mean, m.running_var) for model in models for m in model.modules() if isinstance(m, kinds)]
    try:
        for layer, _, _ in layers:
            layer.running_mean = layer.running_var = None
        yield
    except ValueError as error:
        if layers and "more than 1 value per channel" in str(error):  # torch's words
            raise ValueError("batch has one row, whose BatchNorm statistics are undefined: give two or more") from error
        raise
    finally:
        for layer, mean, var in layers:
            layer.running_mean, layer.running_var = mean, var
