"""`hf_xent.metrics.ranking.tpr_at_fpr` for `evaluate.load`."""

from hf_xent.metrics import modules
from hf_xent.metrics import ranking as metrics

Metric = modules.wrap(metrics.tpr_at_fpr)
