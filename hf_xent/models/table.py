"""A classifier of rows of numbers for trainers of transformers: a GRU over the features, or a perceptron.

    x = (values - mean) / std                      [B, T]; a mean of 0 and a std of 1, if the configuration has none
    gru   h = GRU(x_1, ..., x_T), the last state   T numbers are read as a sequence of T scalars
    mlp   h = relu(W_L ... relu(W_1 x + b_1) + b_L)
    logits = W dropout(h) + b                      `classifier`, which `hf_xent.classes.resize` gives another width

    config = TableConfig(features=9, num_labels=2, mean=rows.mean(0).tolist(), std=rows.std(0).tolist())
    model = TableForSequenceClassification(config)

Importing this file registers both classes, so that `AutoModelForSequenceClassification` loads what was saved. The file
is saved with the model, which with `trust_remote_code=True` also loads where hf_xent is not installed.

Source: Agarap 2017, arXiv:1709.03082, for a GRU of 256 cells over features, with dropout .15; its optimiser is no part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

ENCODERS = ("gru", "mlp")


class TableConfig(PreTrainedConfig):
    """Configuration of `TableForSequenceClassification`.

    Args:
        features: The number T of values in a row.
        encoder: 'gru' or 'mlp'.
        hidden_size: The width of the encoder.
        num_hidden_layers: The number of its layers.
        dropout: The share of the encoder's outputs that is set to 0 in training, in [0, 1).
        mean: What is subtracted from each value [T]; nothing if None.
        std: What it is divided by [T], above 0; nothing if None.
        initializer_range: Standard deviation of the first weights of the head.
        **kwargs: As for `transformers.PreTrainedConfig`, such as num_labels.

    Raises:
        ValueError: An encoder that is unknown, a dropout out of range, or a mean or std of another length or sign.
    """

    model_type = "hf_xent_table"

    def __init__(  # noqa: PLR0913  one argument for each field of the configuration
        self, features: int = 1, encoder: str = "gru", hidden_size: int = 256, num_hidden_layers: int = 1,
        dropout: float = 0.15, mean: list[float] | None = None, std: list[float] | None = None,
        initializer_range: float = 0.02, **kwargs: Any,
    ):  # fmt: skip
        if encoder not in ENCODERS:
            raise ValueError(f"encoder is {encoder!r}: choose one of {', '.join(ENCODERS)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: choose 0 <= dropout < 1")
        for name, given in (("mean", mean), ("std", std)):
            if given is not None and len(given) != features:
                raise ValueError(f"{name} has {len(given)} numbers for {features} features: give one for each")
        if std is not None and not min(std) > 0:
            raise ValueError(
                f"std has the number {min(std)}: give 1 for a feature that is constant, others are above 0"
            )
        self.features, self.encoder, self.hidden_size = features, encoder, hidden_size
        self.num_hidden_layers, self.dropout = num_hidden_layers, dropout
        self.mean, self.std, self.initializer_range = mean, std, initializer_range
        super().__init__(**kwargs)


class TableForSequenceClassification(PreTrainedModel):
    """A classifier of rows of numbers; with `num_labels=1` and labels that are numbers, a regression."""

    config_class = TableConfig
    main_input_name = "values"
    mean: Tensor
    std: Tensor

    def __init__(self, config: TableConfig):
        super().__init__(config)
        width, layers = config.hidden_size, config.num_hidden_layers
        self.encoder: Any = nn.ModuleList(nn.Linear(width if i else config.features, width) for i in range(layers))
        if config.encoder == "gru":
            self.encoder = nn.GRU(1, width, layers, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, config.num_labels)
        self.register_buffer("mean", torch.tensor(config.mean or [0.0] * config.features))
        self.register_buffer("std", torch.tensor(config.std or [1.0] * config.features))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The head starts as transformers' heads do, the encoder as torch's layers do."""
        if module is self.classifier:
            super()._init_weights(module)
        elif isinstance(module, nn.Linear | nn.GRU):
            module.reset_parameters()

    def forward(
        self, values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> SequenceClassifierOutput:
        """Logits of rows, and their loss if labels are given.

        Args:
            values: Rows of numbers [B, T].
            labels: Ids of classes [B], or numbers if the model has one output.
            output_hidden_states: Whether to return what each layer makes: [B, 1, hidden_size] of 'mlp'; of 'gru' the
                states of its last layer alone, [B, T, hidden_size].

        Returns:
            `logits` [B, num_labels], `loss` as transformers' sequence classifiers have it, and `hidden_states`.

        Raises:
            ValueError: Rows of another length than the configuration has.
        """
        if values.shape[1:] != self.mean.shape:
            raise ValueError(f"values has shape {tuple(values.shape)}: give rows of {len(self.mean)} numbers, [B, T]")
        x = ((values.float() - self.mean.float()) / self.std.float()).to(self.classifier.weight.dtype)
        if isinstance(self.encoder, nn.GRU):
            states = [self.encoder(x[..., None])[0]]
        else:
            states = []
            for layer in self.encoder:
                x = layer(x).relu()
                states.append(x[:, None])
        logits = self.classifier(self.dropout(states[-1][:, -1]))
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=tuple(states) if output_hidden_states else None
        )


AutoConfig.register(TableConfig.model_type, TableConfig, exist_ok=True)
AutoModelForSequenceClassification.register(TableConfig, TableForSequenceClassification, exist_ok=True)
TableConfig.register_for_auto_class()
TableForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
