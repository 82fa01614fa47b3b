"""The plans of docs/results/ln_free.md: a small GPT-2, and SmolLM2-135M."""

from benchmarks.studies import ln_free_gpt2, ln_free_smollm2

PLANS = (ln_free_gpt2.PLAN, ln_free_smollm2.PLAN)
