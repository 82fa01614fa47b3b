"""`hf_xent.metrics.ranking.fpr_at_tpr` for `evaluate.load`."""

from hf_xent.metrics import modules
from hf_xent.metrics import ranking as metrics

Metric = modules.wrap(metrics.fpr_at_tpr)
