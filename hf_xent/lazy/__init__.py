"""Logits that take their own loss.

`LazyLogits` has the shape, dtype and device of a head's output and holds (hidden, weight, bias); nothing is multiplied.
What a causal LM does to its logits on the way to the loss is recorded:

    value = inner * raw            or            outer * tanh(inner * raw)            raw = hidden @ weight.T + bias

(scale, softcap, dtype casts), row slices and reshapes act on hidden, a vocabulary slice on the weight; a LoRA branch
and a bias join the head. Consumers that need a few floats a token (`F.cross_entropy`, `nll_loss` and `gather` of
`log_softmax`, `logsumexp`, `argmax`) are answered by `hf_xent.ops`. Any other operation, and any argument that is not
known here, makes the dense tensor, once, with autograd: always correct, but the logits are materialized.

Memory is shared as torch shares it: what torch makes a view writes through to its base, a copy does not. Operands are
kept, not copied, so logits have to be read before the weights change (`optimizer.step()`); afterwards it is an error.

The wrapper has a grad_fn of its own, so consumers below Python (custom autograd functions, hooks of wrappers) see a
value through `__torch_dispatch__` and their gradients still reach hidden and the weight.
"""

from . import consumers, shapes  # noqa: F401  they register their answers
from .state import PatchState, Seam, TokenSums, next_token_labels
from .tensor import LazyLogits

__all__ = ["LazyLogits", "PatchState", "Seam", "TokenSums", "next_token_labels"]
