"""Floor 1: cards rendered from templates and checked offline, and folders pushed to the Hub whole or not at all."""

from .cards import render, validate
from .push import push

__all__ = ["push", "render", "validate"]
