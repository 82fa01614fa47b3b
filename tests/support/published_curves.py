"""The published loss curves of `multi_power_curves.json`, which says whose they are, with the lr of every step."""

import json
from functools import cache
from pathlib import Path

import numpy as np

from hf_xent.laws import Curve

PUBLISHED = json.loads((Path(__file__).parent / "multi_power_curves.json").read_text("utf-8"))
PEAK, FLOOR = PUBLISHED["peak"], PUBLISHED["peak"] / 10


def schedule(name, steps=24_000):
    """The learning rate of every step, [steps]; its values at the published steps are those of the CSV files."""
    step = np.arange(1, steps + 1)
    after = step - PUBLISHED["warmup"]
    rate = PEAK * np.minimum(1, step / PUBLISHED["warmup"])
    if name.startswith("cosine"):
        cosine = FLOOR + (PEAK - FLOOR) * (1 + np.cos(np.pi * after / (steps - PUBLISHED["warmup"]))) / 2
        return np.where(after > 0, cosine, rate)
    decayed = (step - 20_000) / 4_000
    if name.startswith("wsd_"):
        return np.where(decayed > 0, PEAK * (FLOOR / PEAK) ** decayed, rate)
    if name.startswith("wsdld"):
        return np.where(decayed > 0, PEAK + (FLOOR - PEAK) * decayed, rate)
    if name.startswith("wsdcon"):
        return np.where(step >= 8_000, float(name.split("_")[1]) * 1e-5, rate)[:16_000]
    return rate


@cache
def published(name, size=100):
    """A published curve by name and by the size of its model, in millions of parameters."""
    curves, every = PUBLISHED["curves"][str(size)], PUBLISHED["every"]
    written = curves[name]
    step = written["first"] + every * np.arange(len(written["loss"]))
    loss = np.array(written["loss"])
    if "like" in written:
        before = curves[written["like"]]
        early = before["first"] + every * np.arange(len(before["loss"]))
        kept = early < written["first"]
        step, loss = np.concatenate([early[kept], step]), np.concatenate([np.array(before["loss"])[kept], loss])
    return Curve(schedule(name), step, loss, params=size * 1e6, name=name)
