"""Floor 1: laws of losses, one file per law, registered by name, with one fitter. Needs only numpy and scipy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # imported on first use, as the laws are: `hf-xent --help` needs no scipy
    from .base import Law

LAWS: Registry[type[Law]] = Registry(
    "law",
    {
        "power": "power:PowerLaw",
        "parametric": "parametric:ParametricLoss",
        "annealing": "annealing:AnnealingLaw",
        "multi_power": "multi_power:MultiPowerLaw",
        "encoder_decoder": "encoder_decoder:EncoderDecoder",
        "downstream": "downstream:DownstreamLoss",
        "log": "log:LogLaw",
    },
    package=__name__,
)
"""Name -> law."""

_OTHER_NAMES = {
    "Law": "base",
    "Curve": "curves",
    "read": "curves",
    "sums": "schedules",
    "fit": "fitting",
    "Fit": "fitted",
    "Forecast": "fitted",
    "Errors": "fitted",
    "Allocation": "allocation",
    "Split": "allocation",
    "compute_optimal": "allocation",
    "optimal_split": "allocation",
}


def get(law: str | Law | type[Law], **options: Any) -> Law:
    """A law by its registry name, with its fields as options; a law object is returned unchanged.

    Args:
        law: A name, with options after it as in 'annealing:decay=0.99'; a law; or the class of one.
        **options: Fields of the law: its parameters and its options.

    Returns:
        The law. A parameter that is not given is nan, and `fit` finds it.

    Raises:
        ValueError: The name is unknown, or the law does not have an option or does not accept its value.
    """
    from .base import Law

    if isinstance(law, type) and issubclass(law, Law):
        return law(**options)
    found: Law = LAWS.instance(law, Law, **options)
    return found


def table() -> list[dict[str, Any]]:
    """The registered laws as a table, read from their files without importing them, for help texts and the README.

    Returns:
        One row per law: what `Registry.row` reads (`name`, `summary`, `formula`, `options`, `help`, `source`, ...),
        with its `class`.
    """
    return [{**row, "class": row["object"]} for row in LAWS.table()]


__all__ = sorted(("LAWS", *LAWS.exported, *_OTHER_NAMES, "get", "table"))


def __getattr__(name: str) -> Any:
    return LAWS.attribute(name, _OTHER_NAMES)
