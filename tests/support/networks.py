"""The networks of hf_xent that are saved with their code: a tiny one of each, and inputs for it.

A network's file imports torch, transformers, and files beside it, nothing else of hf_xent: it also loads where hf_xent
is not installed. A new network is one function and one line in NETWORKS.
"""

import torch


def basnet():
    from hf_xent.models.basnet import BasnetConfig, BasnetForSemanticSegmentation

    config = BasnetConfig([4, 6, 6], [1, 2, 1], refine_size=4, refine_depth=2, num_channels=1, num_labels=1)
    return BasnetForSemanticSegmentation(config), {"pixel_values": torch.randn(2, 1, 13, 10)}


def digits():
    from hf_xent.continuous import DigitModel, DigitModelConfig

    decoder = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = [[-1.0, 0.0, 2.0], [0.5, 1.0, 1.5]]
    options = {"kind": "random_order", "layers": 1, "width": 8, "heads": 2, "std": [2.0, 1.0], "classes": 3}
    config = DigitModelConfig(
        {"model_type": "llama", "vocab_size": 3, "dtype": "float32", **decoder}, values, **options
    )
    x = torch.randn(2, 4, 2)
    return DigitModel(config), {"values": x, "labels": x, "classes": torch.tensor([2, 0])}


def landmarks():
    from transformers import ResNetConfig

    from hf_xent.models.landmarks import LandmarkConfig, LandmarkModel

    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"}
    backbone = ResNetConfig(**sizes, out_features=["stage1", "stage2"])
    config = LandmarkConfig(backbone_config=backbone, rings=[5, 4], latent_size=4, latent_map=(2, 2), width=8)
    return LandmarkModel(config), {"pixel_values": torch.randn(2, 1, 32, 32), "labels": torch.rand(2, 9, 2)}


def localizer():
    from transformers import ResNetConfig

    from hf_xent.localization.localizer import Localizer, LocalizerConfig

    inner = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 1, 1], layer_type="basic", num_labels=3)
    model = Localizer(LocalizerConfig(classifier=inner, layer="resnet.encoder.stages.1", feature_size=6))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}


def mask_net():
    from hf_xent.models.mask_net import MaskNet, MaskNetConfig

    model = MaskNet(MaskNetConfig(channels=(3, 4, 5), dilations=(1, 2), num_labels=1))
    return model, {"pixel_values": torch.randn(2, 1, 17, 9)}


def rationale():
    from transformers import BertConfig

    from hf_xent.localization.rationale import Rationale, RationaleConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    inner = BertConfig(vocab_size=20, num_labels=3, dtype="float32", **sizes)
    config = RationaleConfig(inner, special_ids=[0, 1], mask_id=2)
    ids = torch.randint(3, 20, (2, 5))
    return Rationale(config), {"input_ids": ids, "labels": torch.tensor([0, 2])}


def table():
    from hf_xent.models.table import TableConfig, TableForSequenceClassification

    config = TableConfig(features=3, hidden_size=6, num_labels=4, mean=[1.0, 2.0, 3.0])
    return TableForSequenceClassification(config), {"values": torch.randn(2, 3)}


NETWORKS = {
    "basnet": basnet,
    "digits": digits,
    "landmarks": landmarks,
    "localizer": localizer,
    "mask_net": mask_net,
    "rationale": rationale,
    "table": table,
}
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
