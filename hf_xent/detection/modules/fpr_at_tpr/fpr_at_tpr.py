"""`hf_xent.detection.metrics.fpr_at_tpr` for `evaluate.load`."""

from hf_xent.detection import metrics, modules

Metric = modules.wrap(metrics.fpr_at_tpr)
