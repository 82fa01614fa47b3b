"""`hf_xent.detection.metrics.tpr_at_fpr` for `evaluate.load`."""

from hf_xent.detection import metrics, modules

Metric = modules.wrap(metrics.tpr_at_fpr)
