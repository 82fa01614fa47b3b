"""The roofline page is what the code writes, and its stages are what bytes and operations alone imply."""

from dataclasses import replace
from math import inf

import pytest

from benchmarks import estimates, roofline
from benchmarks.estimates import BEFORE, EPILOGUES, STORED, Device, Shape, streamed

GEMMA2, TRL = roofline.SHAPES[:2]
ONE_BYTE, ONE_OPERATION = Device("bytes", inf, 1.0, 1.0), Device("operations", 1.0, inf, inf)  # per second


def test_the_page_in_the_repository_is_what_the_code_writes():
    text = roofline.page()
    assert (roofline.FOLDER.parent / "roofline.md").read_text(encoding="utf-8") == text
    first = text.split("\n\n")[1]
    assert first.startswith("Every number on this page is an estimate unless it is marked 'measured'.")


def test_a_measured_plan_is_shown_beside_its_estimate_and_another_plan_is_not():
    """768 rows of TRL's shape were measured in two visits, and later in one, which is what is planned."""
    lines = [line for line in roofline.page().splitlines() if line.startswith("| hf_xent | ") and "x 768" in line]
    gemma2, trl = (next(line for line in lines if f"{chunks} x 768 |" in line and "(" in line) for chunks in (11, 22))
    assert "52.1 (1.20) measured | tune-3.jsonl:13" in gemma2
    assert "85.2 (1.16) measured | tune-3.jsonl:28" in trl
    assert any("22 x 768, two visits" in line and "tune-2.jsonl:118" in line for line in lines)


def test_plans_cover_all_tokens_and_that_of_9cec539_is_the_measured_one():
    for shape in roofline.SHAPES:
        for design in (EPILOGUES, BEFORE):
            heights, panels = design.plan(shape, None)
            assert (sum(heights), sum(panels)) == (shape.N, shape.V)
    assert BEFORE.plan(GEMMA2, None)[0] == [560] * 14 + [352]


def test_the_weight_gradient_is_written_by_every_chunk_and_read_by_all_but_the_first():
    heights, _ = EPILOGUES.plan(GEMMA2, None)
    assert len(heights) == 11
    total = 11 * 256000 * 2304 * 2 + 10 * 256000 * 2304 * 2
    assert estimates.weight_traffic(GEMMA2, len(heights)) == total
    seconds = sum(estimates.weight_gradient(ONE_BYTE, GEMMA2, n, i == 0) for i, n in enumerate(heights))
    assert seconds == pytest.approx(total, rel=1e-12)


def test_passes_over_stored_rows_are_all_that_the_epilogue_saves_in_bytes():
    """Apart from its own cost, which is arithmetic and the bytes of the logits' matmul."""
    stored, fused = (streamed(design, ONE_BYTE, GEMMA2).seconds for design in (STORED, EPILOGUES))
    heights, _ = EPILOGUES.plan(GEMMA2, None)
    matmul = sum(2 * (n * 2304 + 2304 * 256000 + n * 256000) for n in heights)
    assert stored - fused == pytest.approx(3 * 2 * 8192 * 256000 - estimates.EPILOGUE * matmul, rel=1e-9)


@pytest.mark.parametrize(("most_chunks", "matmuls"), [(16, 4), (32, 3)])
def test_two_visits_are_four_matmuls(most_chunks, matmuls):
    estimate = streamed(replace(STORED, most_chunks=most_chunks), ONE_OPERATION, TRL)
    assert estimate.visits == matmuls - 2
    assert estimate.seconds == pytest.approx(matmuls * 2 * 16384 * 248320 * 2048, rel=1e-9)


def test_cut_cross_entropy_reads_its_operands_once_a_tile():
    shape = Shape("two tiles", 128, 256, 64)
    operand = 128 * 64 * 2
    assert estimates.cut(ONE_BYTE, shape, share=0.0).seconds == 2 * 2 * 2 * operand
    assert estimates.cut(ONE_BYTE, shape, share=1.0).seconds == 2 * 2 * 2 * operand + 2 * (2 + 4) * operand
