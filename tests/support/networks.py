"""The networks of hf_xent that are saved with their code: a tiny one of each, and inputs for it.

A network's file imports torch, transformers, and files beside it, nothing else of hf_xent: it also loads where hf_xent
is not installed. A new network is one function and one line in NETWORKS.
"""

import torch


def table():
    from hf_xent.models.table import TableConfig, TableForSequenceClassification

    config = TableConfig(features=3, hidden_size=6, num_labels=4, mean=[1.0, 2.0, 3.0])
    return TableForSequenceClassification(config), {"values": torch.randn(2, 3)}


def localizer():
    from transformers import ResNetConfig

    from hf_xent.localization.localizer import Localizer, LocalizerConfig

    inner = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 1, 1], layer_type="basic", num_labels=3)
    model = Localizer(LocalizerConfig(classifier=inner, layer="resnet.encoder.stages.1", feature_size=6))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}


NETWORKS = {"localizer": localizer, "table": table}
"""Name -> a function that returns a model with random weights, and inputs of its forward."""


def built(name):
    """The model, in evaluation, and its inputs; always the same."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    return model.eval(), inputs


def run(model, inputs):
    """The tensors of its outputs, by name."""
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = model(**inputs)
    return {name: x for name, x in outputs.items() if isinstance(x, torch.Tensor)}
