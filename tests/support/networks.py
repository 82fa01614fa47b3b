"""The networks of hf_xent that are saved with their code: a tiny one of each, and inputs for it.

A network's file imports torch, transformers, and files beside it, nothing else of hf_xent: it also loads where hf_xent
is not installed. A new network is one function and one line in NETWORKS.
"""

import torch


def table():
    from hf_xent.models.table import TableConfig, TableForSequenceClassification

    config = TableConfig(features=3, hidden_size=6, num_labels=4, mean=[1.0, 2.0, 3.0])
    return TableForSequenceClassification(config), {"values": torch.randn(2, 3)}


def landmarks():
    from transformers import ResNetConfig

    from hf_xent.models.landmarks import LandmarkConfig, LandmarkModel

    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"}
    backbone = ResNetConfig(**sizes, out_features=["stage1", "stage2"])
    config = LandmarkConfig(backbone_config=backbone, rings=[5, 4], latent_size=4, latent_map=(2, 2), width=8)
    return LandmarkModel(config), {"pixel_values": torch.randn(2, 1, 32, 32), "labels": torch.rand(2, 9, 2)}


NETWORKS = {"table": table, "landmarks": landmarks}
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
