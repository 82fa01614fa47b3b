"""A causal LM whose norms are gone: identities in their places, biases where folding them away needed some.

What the stock class of its architecture is changed by stands in its configuration, and so does a model type of its own:
a stock class would put fresh norms where there are none, so that none may take it for one of its checkpoints.

    model_type = "ln_free_gpt2"
    ln_free = {"norms": {a norm's module name: [its readers' names]}, "biases": [readers that got a bias]}

Loads with `trust_remote_code=True`, from torch and transformers alone; this file travels with the weights. Norm, scale
and center were folded into the readers: W diag(gain) (I - 11'/D) and b + W beta (see `hf_xent.ln_free.convert`).
"""

from pathlib import Path
from typing import Any

from torch import nn

PREFIX = "ln_free_"  # of model types
CLASSES = '''

class {config}({stock_config}):
    """Of a model without norms."""

    model_type = "{model_type}"


class {model}(LNFree, {stock}):
    """Without norms."""

    config_class = {config}
'''


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
        classes = {"AutoConfig": type(config).__name__, "AutoModelForCausalLM": type(self).__name__}
        config.auto_map = {auto: f"modeling_ln_free.{name}" for auto, name in classes.items()}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights, configuration, and this file, which ends with the two classes of this architecture."""
        names = (self.config.auto_map[auto] for auto in ("AutoModelForCausalLM", "AutoConfig"))
        model, config = (name.rpartition(".")[2] for name in names)  # not type(self)'s, which sharding changes
        text = Path(__file__).read_text(encoding="utf-8")
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # the stock class has it
        if f"\nclass {model}(" not in text:
            stock, stock_config = (name.removeprefix("LNFree") for name in (model, config))
            text = text.replace("import nn\n", f"import nn\nfrom transformers import {stock}, {stock_config}\n", 1)
            made = {"model": model, "config": config, "stock": stock, "stock_config": stock_config}
            text += CLASSES.format(**made, model_type=self.config.model_type)
        Path(save_directory, "modeling_ln_free.py").write_text(text, encoding="utf-8")
        return saved
