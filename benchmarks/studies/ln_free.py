"""The plans of docs/results/ln_free.md."""

from benchmarks.studies import ln_free_smollm2

PLANS = (ln_free_smollm2.PLAN,)
