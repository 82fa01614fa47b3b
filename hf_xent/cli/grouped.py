"""The list of commands in `hf-xent --help`: in groups, with the first sentence of each in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typer.core import TyperGroup

GROUPS = {
    "Train": (
        "train", "sft", "emo", "noisefit", "distill", "spce", "spo", "osp", "f2c", "eisl", "classify", "dxo",
        "self-distil-qa", "encoder-calibration", "siamese-ctc", "ln-free", "search",
    ),
    "Use and measure": ("generate", "detect", "attack", "losses", "check", "bench", "report", "plan", "scaling"),
    "Data, pages and the Hub": ("data", "show", "publish"),
}  # fmt: skip
"""Title -> commands, in the order of the help; those that are in no group come last."""
LONGEST = 200


class Whole(TyperGroup):
    """Commands with the first sentence of each in full, which click would cut to one line."""

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    rest: ClassVar[str] = "Commands"
    """The title of the commands that are in no group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A section for each group."""
        there = {name: self.commands[name] for name in self.list_commands(ctx)}
        listed = {name for names in self.groups.values() for name in names}
        groups = {**self.groups, self.rest: tuple(name for name in there if name not in listed)}
        width = max(map(len, there), default=0)
        for title, names in groups.items():
            commands = {name: there[name] for name in names if name in there}
            rows = [(name.ljust(width), command.get_short_help_str(LONGEST)) for name, command in commands.items()]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Grouped(Whole):
    """The commands of the app, in groups."""

    groups, rest = GROUPS, "More"
