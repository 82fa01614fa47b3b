"""Pages of studies: their sections, and blocks that are what the kept results give."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.studies.__main__ import STUDIES, plans
from benchmarks.studies.plan import PAGES, replace_block, summary, write_page

SECTIONS = [
    "In one sentence", "Decided beforehand", "Results", "What it means", "What it does not show", "How it was run",
]  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_page_has_its_sections_and_the_numbers_of_the_results(name, tmp_path):
    page = Path(shutil.copy(PAGES / f"{name}.md", tmp_path))
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    write_page(page, plans(name))
    assert page.read_text(encoding="utf-8") == text, f"run `python -m benchmarks.studies page {name}`"


def test_overview_has_the_claims_of_all_pages(tmp_path):
    page = Path(shutil.copy(PAGES / "studies.md", tmp_path))
    text = page.read_text(encoding="utf-8")
    replace_block(page, "<!-- summary -->", summary({name: plans(name) for name in STUDIES}))
    assert page.read_text(encoding="utf-8") == text, "run `python -m benchmarks.studies overview`"


@pytest.mark.parametrize("name", STUDIES)
def test_every_claim_is_about_arms_that_the_study_has(name):
    for plan in plans(name):
        for claim in plan.claims:
            assert {claim.arm, claim.against or plan.baseline} <= set(plan.arms)
        assert len(plan.claims) <= 6 and plan.seeds >= 3
