"""The recipes: each is a file and a line here."""

from __future__ import annotations

from typing import Any

from ..registry import Registry

RECIPES: Registry[Any] = Registry(
    "recipe",
    {
        "sft": "sft:SFT",
        "emo": "emo:EMO",
        "noisefit": "noisefit:NoiseFiT",
        "ln-free": "ln_free:LNFree",
    },
    package=__package__,
)
"""Command -> recipe."""
