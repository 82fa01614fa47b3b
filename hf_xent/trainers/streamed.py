"""TRL's preference trainers without logits: policy and reference model are patched, also where TRL loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..hub import Carded
from ..patching import ensure_patched, head_of, patch_state
from .base import Mixin
from .refusals import refuse_encoder_decoder
from .rows import TEXT

ANSWERS: Mapping[str, str] = dict.fromkeys(("prompt", "chosen", "rejected", "completion"), TEXT)
"""The text columns of a preference trainer."""


class Streamed(Carded, Mixin):
    """Goes before a TRL trainer in a class's bases: hf_xent's kernels compute what TRL asks of its fused head.

    A push writes the card of hf_xent. A model that is already patched keeps its patch; a reference model that is not
    gets the options of the policy's patch.
    """

    needed: tuple[str, ...] = ()
    """The columns that a data set must have."""
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "preference losses have label_smoothing: set that one",
        "use_liger_kernel": "Liger's loss would replace this trainer's: set it to False",
    }
    """See `hf_xent.trainers.base.Method`."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "_name" in vars(cls) and "_tag_names" not in vars(cls):  # TRL's attributes: the method, its models' tags
            cls._tag_names = ["trl", cls._name.lower(), "hf_xent"]

    def __init__(self, *args: Any, **kwargs: Any):
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, str):  # TRL loads a path or Hub id
            refuse_encoder_decoder(model)
            head_of(model)  # type: ignore[arg-type]  # raises for a model that is not a language model
        if getattr(kwargs.get("processing_class"), "eos_token", "") is None:
            raise ValueError("processing_class has no eos_token, but answers end with one: set tokenizer.eos_token")
        try:
            super().__init__(*args, **kwargs)
        except OSError as error:
            if isinstance(model, nn.Module) and not model.config._name_or_path:  # type: ignore[union-attr]
                raise ValueError(
                    "model has no name from which its tokenizer or reference could be loaded: pass processing_class and"
                    " ref_model, or save the model and load it from there"
                ) from error
            raise
        self._patch_models()

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL. Raises: ValueError for a data set without the needed columns, or without a row that fits."""
        if not hasattr(dataset, "map"):
            raise ValueError(
                f"a data set is a {type(dataset).__name__}: pass a datasets.Dataset, as by Dataset.from_list"
            )
        names = getattr(dataset, "column_names", None) or [*self.needed]  # a stream may not know its columns
        missing = [name for name in self.needed if name not in names]
        if missing:
            raise ValueError(f"the data has no column {' and no '.join(missing)}, but {', '.join(names)}: rename them")
        dataset = super()._prepare_dataset(dataset, *args, **kwargs)
        if hasattr(dataset, "__len__") and not len(dataset):
            raise ValueError("no row is left: every prompt has max_length tokens or more, raise max_length")
        return dataset

    def _patch_models(self) -> None:
        ensure_patched(self.model)
        reference = getattr(self, "ref_model", None)  # ORPO has none
        if reference is not None:
            ensure_patched(reference, **patch_state(self.model).options)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._patch_models()  # TRL computes them before its __init__ returns
        return super()._precompute_ref_logps(*args, **kwargs)
