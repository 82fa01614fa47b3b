"""Training under the earth mover's distance to the label, mixed with cross-entropy (EMO).

The objective is the registry's `emo` (`hf_xent.losses.EMO`); this trainer makes its options fields of the
configuration, and reads the cost from another model's head if `cost` names one. The method's baselines run in it
unchanged, for fair comparison: `EMOConfig(loss="tailr:gamma=1e-7, w_min=0.2")`, `"mixce:eta=0.1"`, `"cross_entropy"`.

Defaults are those of the authors' language-modeling experiments (their `gpt2.py`): emo1 without a clamp, over a frozen
copy of the pretrained head. Their package clamps the ratio at 3 (`ratio_clamp=3.0`; the logged loss is then below the
NLL); their instruction tuning uses the current head (`cost="current", gt_detach=True`).

Source: Ren, Wu, Zhu 2024, arXiv:2310.04691; variants as in the authors' code, github.com/DRSY/EMO.
Data: as for `XentTrainer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..losses.base import Loss
from ..losses.emo import EMO
from ..models import loading
from ..patching import head_of
from .refusals import refuse_options
from .xent import XentConfig, XentTrainer

OPTIONS = ("variant", "cost", "gt_detach", "ratio_clamp")


@dataclass
class EMOConfig(XentConfig):
    """`XentConfig` and the options of EMO.

    Raises:
        ValueError: A field has a value out of its range or of another type.
    """

    ranges: ClassVar[dict[str, str]] = {"ratio_clamp": "(0, inf]"}

    loss: str = field(
        default="emo",
        metadata={"help": "'emo', with the options below; any other loss of the registry trains a baseline instead."},
    )
    variant: str = field(
        default="emo1",
        metadata={
            "help": "'emo1' has the value of the cross-entropy, 'emo2' twice that of the distance; 'emo' is the"
            " distance alone."
        },
    )
    cost: str = field(
        default="frozen",
        metadata={
            "help": "Embeddings whose cosines are the cost: 'frozen' (a copy of the initial head), 'current' (the head"
            " at every step), or a model (Hub id or path) of the same vocabulary, of any hidden size."
        },
    )
    gt_detach: bool = field(
        default=False,
        metadata={"help": "Add the label's probability, without gradient, to the distance: only the ratio changes."},
    )
    ratio_clamp: float | None = field(
        default=None,
        metadata={"help": "Upper bound of emo1's ratio of cross-entropy to distance; 3.0 in the authors' package."},
    )


class EMOTrainer(XentTrainer):
    """Fine-tunes a causal LM under EMO; see the module's docstring and `XentTrainer`.

        loss = 1/2 (nll + sg[nll / d] d)          d = 1 - sum_i p_i cos(E_i, E_y)          for variant emo1

    Args:
        model: The pretrained causal LM, also when resuming: `cost="frozen"` copies its head.
        args: The configuration. A plain `XentConfig` without a loss is accepted too: it trains EMO with its defaults.
        loss: Registry name or `hf_xent.losses.Loss` of a baseline; it takes precedence over `args.loss`.
        **kwargs: As for `XentTrainer`, including the data sets.

    Raises:
        ValueError: Options that EMO does not take or a baseline does not read, a cost whose vocabulary is not the
            model's, or what `XentTrainer` refuses.

    Source: Ren, Wu, Zhu 2024, arXiv:2310.04691.
    """

    config_class = EMOConfig

    @classmethod
    def _accepts(cls, args: Any) -> bool:
        """As `Method`; a plain `XentConfig` is accepted too, if its loss is the default or EMO."""
        plain = type(args) is XentConfig and args.loss in (XentConfig.loss, "emo")
        return plain or super()._accepts(args)

    @classmethod
    def _objective(cls, args: XentConfig, loss: str | Loss | None) -> Loss:
        name = loss or (args.loss if isinstance(args, EMOConfig) else "emo")
        fields = OPTIONS if isinstance(args, EMOConfig) else ()
        if name != "emo":
            refuse_options(args, dict.fromkeys(fields, f"the loss is {name!r}: it is an option of loss='emo' alone"))
            return super()._objective(args, loss)
        refuse_options(args, {"label_smoothing_factor": "it smooths cross-entropy only, and the loss is EMO"})
        options = {name: getattr(args, name) for name in fields}
        if options.get("cost", "frozen") not in ("frozen", "current"):
            options["cost"] = head_of(loading.load(options["cost"])[0]).weight.detach()
        return EMO(**options)
