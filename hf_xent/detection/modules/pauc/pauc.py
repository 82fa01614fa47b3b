"""`hf_xent.detection.metrics.pauc` for `evaluate.load`."""

from hf_xent.detection import metrics, modules

Metric = modules.wrap(metrics.pauc)
