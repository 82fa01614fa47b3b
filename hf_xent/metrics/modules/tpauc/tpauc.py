"""`hf_xent.metrics.ranking.tpauc` for `evaluate.load`."""

from hf_xent.metrics import modules
from hf_xent.metrics import ranking as metrics

Metric = modules.wrap(metrics.tpauc)
