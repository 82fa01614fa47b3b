"""Floor 1: cards, rendered from templates and checked offline, and pushes of whole folders to the Hub."""

from .cards import REQUIRED, known, render, set_license, validate
from .model import Carded, Tokenless, origin, write_card
from .push import check_rights, files, push
from .results import eval_results
from .usage import Usage, set_place, usage_of

__all__ = [
    "REQUIRED",
    "Carded",
    "Tokenless",
    "Usage",
    "check_rights",
    "eval_results",
    "files",
    "known",
    "origin",
    "push",
    "render",
    "set_license",
    "set_place",
    "usage_of",
    "validate",
    "write_card",
]
