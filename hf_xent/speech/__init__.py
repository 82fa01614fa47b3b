"""Floor 1: waveforms: spectra, masks of spectra, and the separation of a voice from music."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .features import PadSpeech as PadSpeech
    from .features import frame_count as frame_count
    from .features import log_mel as log_mel
    from .features import standardized as standardized
    from .waves import read_wav as read_wav
    from .waves import write_wav as write_wav

_HOMES: dict[str, str] = {
    **dict.fromkeys(("PadSpeech", "frame_count", "log_mel", "standardized"), ".features"),
    **dict.fromkeys(("read_wav", "write_wav"), ".waves"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)
