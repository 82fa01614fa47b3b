"""The study of memory and time: borders, a limit that holds, and the smallest runs of both plans."""

import pytest

from benchmarks.studies import cce, cce_steps
from benchmarks.studies.cce_steps import PATCHED, STOCK, Training
from benchmarks.studies.plan import Job


@pytest.mark.parametrize("true", [0, 1, 2, 7, 40, 333, 512])
@pytest.mark.parametrize("start", [1, 30, 512])
def test_the_border_is_found_from_any_start(true, start):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= true

    low, high = cce.border(fits, start, 1, 512)
    assert low <= true < high and (high - low <= 1 or high <= low * cce.CLOSE)
    assert len(asked) == len(set(asked)) <= 14 and (low == 0 or low in asked) and (high == 513 or high in asked)


@pytest.mark.parametrize("square", [0, 3])
def test_the_size_whose_need_is_the_room_is_found(square):
    def need(size):
        return 1000 + 50 * size + square * size**2

    size = cce._secant(need, need(200), 1, 4096)
    assert 0.95 * need(200) <= need(size) <= 1.03 * need(200)
    assert cce._secant(need, 10**12, 1, 4096) == 4096 and cce._secant(need, 10, 1, 4096) == 1


def test_a_step_fits_or_does_not_in_a_process_under_a_limit(monkeypatch):
    training = Training(cce.TINY, lora=False, checkpointing=False)
    room, shape = 96 << 20, {"rows": 4, "length": 128}  # logits of 32 MiB in float32, and their gradient
    assert cce_steps.remote("tries", training, arm=STOCK, room=room, **shape) == {"fits": 0.0}
    monkeypatch.setattr(cce_steps, "limit", lambda room: None)  # of the process of the tests
    monkeypatch.setattr(cce_steps, "return_large_blocks", lambda: None)
    found = cce_steps.tries(training, PATCHED, room=room, **shape)
    assert found["fits"] and found["peak"] < room and found["seconds"] > 0


def test_kept_tries_and_times_are_used_again(tmp_path, monkeypatch):
    calls = []

    def remote(task, training, **options):
        calls.append(task)
        if task == "times":
            return {"ratio": 0.5, STOCK: 2.0, PATCHED: 1.0}
        tokens = options["rows"] * options["length"]
        return {"fits": float(tokens <= (300 if options["arm"] == STOCK else 900)), "seconds": 1.0}

    monkeypatch.setattr(cce, "remote", remote)
    monkeypatch.setattr(cce, "predicted", lambda *_: 4)
    job = Job(tmp_path, tiny=True)
    first = {arm: cce.capacity(arm, 0, job) for arm in (STOCK, PATCHED)}
    made = len(calls)
    assert {arm: cce.capacity(arm, 0, job) for arm in (STOCK, PATCHED)} == first and len(calls) == made
    assert first[STOCK]["batch tokens"] == 256 and first[PATCHED]["batch tokens"] == 896
    assert 285 <= first[STOCK]["sequence tokens"] <= 300
    assert first[PATCHED]["sequence tokens"] == 512  # the model's own limit
    rows = {arm: cce.step_time(arm, 0, job) for arm in (STOCK, PATCHED)}
    name = str(Training(cce.TINY, lora=False, checkpointing=False))
    assert rows[STOCK] == {name: 1.0, f"{name}: seconds": 2.0} and rows[PATCHED][name] == 0.5
    assert calls.count("times") == 1


def test_a_prediction_is_near_the_real_border():
    training = Training(cce.TINY, lora=True, checkpointing=False)
    sizes = [cce.predicted(training, arm, "batch", 256 << 20, 512) for arm in (STOCK, PATCHED)]
    logits = 256 * 2**20 / (cce.ROW * cce.TINY["vocab_size"] * 14)  # bytes each, in bfloat16 and float32 with gradients
    assert sizes[0] == pytest.approx(logits, rel=0.5) and sizes[1] > 4 * sizes[0]
