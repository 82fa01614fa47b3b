"""Every class of transformers' causal-LM and image-text mappings: patched loss and gradients equal stock.

A class that cannot be built or run here is skipped with the reason. On the version of transformers that made the
committed table, every status is the table's.
"""

import pytest

from support.zoo import CASES, LACKS_PACKAGE, committed, judge

LISTED = committed()
# what models warn of in their tiny configurations is not about the patch
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("mapping", "model_type"), CASES)
def test_loss_and_every_gradient_equal_stock(mapping, model_type):
    verdict = judge(mapping, model_type)
    if LISTED is not None:
        listed = LISTED[mapping, model_type]
        if LACKS_PACKAGE not in verdict.note + listed.note:
            assert verdict.status == listed.status, (verdict, listed)
    if verdict.status in ("not built", "not run"):
        pytest.skip(verdict.note)


def test_the_table_lists_every_class():
    if LISTED is None:
        pytest.skip("the table was made with another transformers: cd tests && python -m support.zoo makes it anew")
    assert list(LISTED) == CASES
