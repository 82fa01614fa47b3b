"""Lazy logits: the output of a head, of which losses and statistics are computed without computing the output.

`LazyLogits` has the shape, dtype and device of a head's output and holds (hidden, weight, bias); nothing is multiplied.
The operations that a causal LM applies to its logits before the loss are recorded:

    value = inner * raw            or            outer * tanh(inner * raw)            raw = hidden @ weight.T + bias

(scale, softcap, dtype casts), row slices and reshapes act on hidden, a vocabulary slice on the weight; a LoRA branch
and a bias join the head. Functions that need a few floats per token (`F.cross_entropy`, `nll_loss` and `gather` of
`log_softmax`, `logsumexp`, `argmax`) are computed by `hf_xent.ops`. Any other operation, and any argument that is not
known here, makes the dense tensor, once, with autograd: always correct, but the logits are materialized. Where losses
are computed outside of the model, what is done to its logits is recorded first: see `expressions`.

Memory is shared as in torch: writes to a view change its base, writes to a copy do not. Operands are kept, not copied,
so logits have to be read before the weights change (`optimizer.step()`); to read them afterwards is an error.

The wrapper has its own grad_fn, so code below Python (custom autograd functions, hooks of wrappers) gets values through
`__torch_dispatch__`, and its gradients still reach hidden and the weight.

Where the weight is there only while the head is called, whatever is computed runs in a call of its own (`source`).
"""

from . import arithmetic, consumers, recorded, shapes, traced_rules  # noqa: F401  they register their rules
from .expressions import LazyExpression
from .objective import OBJECTIVE, Objective, check_sequences
from .state import PatchState, Seam, TokenSums, next_token_labels
from .tensor import LazyLogits
from .traced import TracedLogits

__all__ = [
    "OBJECTIVE",
    "LazyExpression",
    "LazyLogits",
    "Objective",
    "PatchState",
    "Seam",
    "TokenSums",
    "TracedLogits",
    "check_sequences",
    "next_token_labels",
]
