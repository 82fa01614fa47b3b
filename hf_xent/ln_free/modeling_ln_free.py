"""A causal LM whose norms are gone: identities in their places, biases where folding them away needed some.

What the stock class of its architecture is changed by stands in its configuration:

    ln_free = {"norms": {a norm's module name: [its readers' names]}, "biases": [readers that got a bias]}

Loads with `trust_remote_code=True`, from torch and transformers alone; this file travels with the weights. Norm, scale
and center were folded into the readers: W diag(gain) (I - 11'/D) and b + W beta (see `hf_xent.ln_free.convert`).
"""

from pathlib import Path
from typing import Any

from torch import nn


class LNFree(nn.Module):
    """What goes before a stock class."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        for name in config.ln_free["norms"]:
            self.set_submodule(name, nn.Identity())
        for name in config.ln_free["biases"]:
            reader: Any = self.get_submodule(name)
            reader.bias = nn.Parameter(reader.weight.new_zeros(reader.out_features))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights, configuration, and this file, which ends with the class."""
        name, text = type(self).__name__, Path(__file__).read_text(encoding="utf-8")
        self.config.auto_map = {"AutoModelForCausalLM": f"modeling_ln_free.{name}"}
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # the stock class has it
        if f"class {name}(" not in text:
            stock = name.removeprefix("LNFree")
            text = text.replace("import nn\n", f"import nn\nfrom transformers import {stock}\n", 1)
            text += f'\n\nclass {name}(LNFree, {stock}):\n    """Without norms."""\n'
        Path(save_directory, "modeling_ln_free.py").write_text(text, encoding="utf-8")
        return saved
