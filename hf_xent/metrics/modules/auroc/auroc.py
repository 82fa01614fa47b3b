"""`hf_xent.metrics.ranking.auroc` for `evaluate.load`."""

from hf_xent.metrics import modules
from hf_xent.metrics import ranking as metrics

Metric = modules.wrap(metrics.auroc)
