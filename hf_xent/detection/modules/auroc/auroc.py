"""`hf_xent.detection.metrics.auroc` for `evaluate.load`."""

from hf_xent.detection import metrics, modules

Metric = modules.wrap(metrics.auroc)
