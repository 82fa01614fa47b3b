"""Floor 1: cards rendered from templates and checked offline, and folders pushed to the Hub whole or not at all."""

from .cards import REQUIRED, render, set_license, validate
from .model import Carded, Tokenless, eval_results
from .push import files, push

__all__ = ["REQUIRED", "Carded", "Tokenless", "eval_results", "files", "push", "render", "set_license", "validate"]
