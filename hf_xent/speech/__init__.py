"""Floor 1: waveforms: spectra, masks of spectra, and the separation of a voice from music."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from ..metrics.signals import si_sdr as si_sdr
    from .features import PadSpeech as PadSpeech
    from .features import frame_count as frame_count
    from .features import log_mel as log_mel
    from .features import standardized as standardized
    from .masks import floored as floored
    from .masks import ideal_binary_mask as ideal_binary_mask
    from .masks import majority as majority
    from .masks import softened as softened
    from .masks import static_mask as static_mask
    from .mixtures import Mixtures as Mixtures
    from .mixtures import joined as joined
    from .separation import apply_mask as apply_mask
    from .separation import separate as separate
    from .separation import voice_mask as voice_mask
    from .stft import STFT as STFT
    from .waves import read_wav as read_wav
    from .waves import write_wav as write_wav

_HOMES: dict[str, str] = {
    **dict.fromkeys(("PadSpeech", "frame_count", "log_mel", "standardized"), ".features"),
    **dict.fromkeys(("floored", "ideal_binary_mask", "majority", "softened", "static_mask"), ".masks"),
    **dict.fromkeys(("Mixtures", "joined"), ".mixtures"),
    **dict.fromkeys(("apply_mask", "separate", "voice_mask"), ".separation"),
    **dict.fromkeys(("read_wav", "write_wav"), ".waves"),
    "STFT": ".stft",
    "si_sdr": "hf_xent.metrics.signals",
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)
