"""A causal LM without norms: identities replace them, and some linear layers have biases that folding has added.

The configuration lists the changes against the stock class of the architecture, and has a separate model type, so that
no stock class loads the checkpoint, which would add untrained norms.

    model_type = "ln_free_gpt2"
    ln_free = {"norms": {a norm's module name: [its readers' names]}, "biases": [readers that got a bias]}

It loads with `trust_remote_code=True` and needs torch and transformers alone; this file is saved with the weights. The
norm's scale and centering were folded into the readers: W diag(gain) (I - 11'/D) and b + W beta (see
`hf_xent.ln_free.convert`).
"""

from pathlib import Path
from typing import Any

from torch import nn

PREFIX = "ln_free_"  # how model types begin
CLASSES = '''

class {config}({stock_config}):
    """Configuration of a model without norms."""

    model_type = "{model_type}"


class {model}(LNFree, {stock}):
    """A model without norms."""

    config_class = {config}
'''


class LNFree(nn.Module):
    """Goes before a stock class in a class's bases, and removes its norms."""

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
        """Saves weights, configuration, and this file, to which the two classes of the architecture are appended."""
        names = (self.config.auto_map[auto] for auto in ("AutoModelForCausalLM", "AutoConfig"))
        model, config = (name.rpartition(".")[2] for name in names)  # not type(self)'s, which sharding changes
        text = Path(__file__).read_text(encoding="utf-8")
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # the stock class has it
        if f"\nclass {model}(" not in text:
            stock, stock_config = (name.removeprefix("LNFree") for name in (model, config))
            text = text.replace("import nn\n", f"import nn\nfrom transformers import {stock}, {stock_config}\n", 1)
            classes = {"model": model, "config": config, "stock": stock, "stock_config": stock_config}
            text += CLASSES.format(**classes, model_type=self.config.model_type)
        Path(save_directory, "modeling_ln_free.py").write_text(text, encoding="utf-8")
        return saved
