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
        "spce": "spce:SPCE",
        "spo": "spo:SPO",
        "osp": "osp:OSP",
        "f2c": "f2c:F2C",
        "eisl": "eisl:EISL",
        "dxo": "dxo:DXO",
        "self-distil-qa": "self_distil_qa:SelfDistilQA",
        "encoder-calibration": "encoder_calibration:EncoderCalibration",
        "siamese-ctc": "siamese_ctc:SiameseCTC",
        "ln-free": "ln_free:LNFree",
    },
    package=__package__,
)
"""Command -> recipe."""
