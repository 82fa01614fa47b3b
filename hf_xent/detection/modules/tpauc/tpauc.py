"""`hf_xent.detection.metrics.tpauc` for `evaluate.load`."""

from hf_xent.detection import metrics, modules

Metric = modules.wrap(metrics.tpauc)
