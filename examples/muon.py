"""Muon for the matrices of a transformer's blocks, AdamW for its embeddings, norms and biases; as one optimizer.

    trainer = XentTrainer(model, config, train_dataset=rows, optimizers=(Muon(model, lr=3e-3), None))

Both follow one learning rate: torch's Muon is set to match the size of AdamW's steps. For pretrain_gpt2.py it needs
half the steps of AdamW alone.
Source: Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks; the scale: Liu et al. 2025,
arXiv:2502.16982.
"""

from __future__ import annotations

from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Of a model whose blocks are under `.h.`, as GPT-2's are."""

    def __init__(self, model: torch.nn.Module, lr: float):
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and ".h." in name]
        rest = [p for name, p in named if p.ndim != 2 or ".h." not in name]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Trainer passes no closure
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
