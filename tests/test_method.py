"""What trainers share: options that hold what they declare, refusals by name, and means of what steps note."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator

from hf_xent.trainers.base import Method, Options
from hf_xent.trainers.means import Sums


@dataclass
class Config(Options):
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"method": ("one", "two", "three"), "power": (1, 2)}
    read_by: ClassVar[dict[str, tuple[str, ...]]] = {"weight": ("one", "two")}

    method: str = "one"
    power: int = 2
    weight: float = 0.5
    output_dir: str = "out"


@dataclass
class Child(Config):
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"side": ("left", "right")}
    side: str = "left"


Config.__module__ = Child.__module__ = "hf_xent.trainers.toy"  # fields of ours are checked, and other methods refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "four"}, "method is 'four': choose 'one', 'two' or 'three'"),
        ({"power": 3}, "power is 3: choose 1 or 2"),
        ({"side": "up"}, "side is 'up': choose 'left' or 'right'"),
        ({"weight": 1.0, "method": "three"}, "weight is 1.0, but method is 'three', which does not read it"),
        ({"weight": "1.0"}, r"weight is '1.0': choose a number in \(-inf, inf\)"),
    ],
)
def test_tables_of_options_are_those_of_all_classes(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Child(**options)


def test_options_that_fit_are_taken():
    assert Child(method="three").weight == 0.5, "the default of what is not read"
    assert Child(method="two", weight=1.0, power=1, side="right").weight == 1.0


class Stock:
    """A trainer of another library."""

    loss_is_scaled_for_ga = model_accepts_loss_kwargs = True


class Parent(Method, Stock):
    config_class = Config
    refused_options = {"power": "it is two: leave it"}  # noqa: RUF012  as trainers declare it
    refused_arguments = {"model_init": "there is a model"}  # noqa: RUF012  as trainers declare it
    means = ("loss_a",)


class Heir(Parent):
    config_class = Child
    refused_options = {"side": "there is one"}  # noqa: RUF012  as trainers declare it
    means = ("loss_b",)
    counts = ("skipped",)
    averages_items = True

    @property
    def accelerator(self):
        return Accelerator(cpu=True)  # a new one: other tests reset the state that an earlier one shares


@pytest.mark.parametrize(
    ("args", "arguments", "message"),
    [
        (Child(power=1), {}, "power is 1, but it is two: leave it"),
        (Child(side="right"), {}, "side is 'right', but there is one"),
        (Child(), {"model_init": dict}, "model_init is given, but there is a model"),
        (Config(), {}, "args is a Config: Heir takes a hf_xent.Child, which has the options of its method"),
    ],
)
def test_refusals_of_all_classes_count(args, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Heir.configured(args, arguments)


def test_what_fits_is_taken_and_none_is_the_default():
    args = Child()
    assert Heir.configured(args, {"model_init": None}) is args and Heir.configured(None) == Child()
    heir = Heir()
    assert not heir.loss_is_scaled_for_ga and not heir.model_accepts_loss_kwargs


def test_means_are_of_what_steps_note():
    heir = Heir()
    heir._note("loss_a", 100.0)  # outside of a step
    for total, count, skipped in ((6.0, 4, 1.0), (torch.tensor(3.0), torch.tensor(2), 0.0)):
        with heir._step(training=True):
            heir._note("loss_a", total, count)
            heir._note("skipped", skipped)
    with heir._step(training=False):
        heir._note("loss_b", 5.0)
    assert heir._means(True) == {"loss_a": 1.5, "skipped": 1}
    assert heir._means(True) == {}, "begun anew"
    assert heir._means(False) == {"loss_b": 5.0}


def test_sums_are_wide_and_without_gradients():
    sums, accelerator = Sums(), Accelerator(cpu=True)
    parts = torch.rand(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for part in parts:
        sums.add("x", part, 1, accelerator.device)
    assert "x" in sums and "y" not in sums
    expected = sum(parts.tolist())  # in Python's doubles, in the same order
    assert sums.take(["x", "y"], accelerator) == {"x": (expected, 1000.0), "y": (0.0, 0.0)}
    assert "x" not in sums and sums.take([], accelerator) == {}
