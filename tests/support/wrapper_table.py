"""The table of wrappers: `python -m support.wrapper_table`, run in tests/ with the package on PYTHONPATH.

A stock and a patched model in each wrapper: what the patched one does, how far its loss and gradients are from the
stock model's, and what torch allocates at its peak in one forward and backward, gradients included. The vocabulary has
16384 tokens, a batch 255 of them (each rank's, of two), and the budget is eight rows of float32 logits, of 64 KiB each.
Adapters and quantized heads have a table of their own (`support.head_table`).
"""

import tempfile
import warnings

import torch

import hf_xent
from hf_xent.patching import patch_state
from support.models import tiny
from support.oracle import peak_bytes
from support.ranks import run_ranks
from support.sharded import wrap

SIZE, ROWS, LENGTH = 16384, 3, 85
BUDGET = 8 * 4 * SIZE
RANKS = ("ZeRO-3", "FSDP1", "FSDP1, head apart")


def step(model, backward=None):
    """The loss of one forward and backward."""
    ids = torch.randint(SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward() if backward is None else backward(loss)
    return loss.detach()


def measured(build, patched, backward=None):
    """Peak bytes, loss, gradients if they are whole, and what was streamed, of a model in its wrapper."""
    model = tiny(vocab_size=SIZE).train()
    inner = hf_xent.patch(model, memory_budget=BUDGET) if patched else model
    wrapper = build(model)
    backward = None if backward is None else getattr(wrapper, backward)
    step(wrapper, backward)  # what is compiled or gathered once is not of interest
    inner.zero_grad()
    kept = []
    peak = peak_bytes(lambda: kept.append(step(wrapper, backward)))
    grads = {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}
    state = patch_state(inner) if patched else None
    counts = None if state is None else (state.streamed, state.materialized, state.bypassed)
    return peak, kept[0], grads, counts


def on_a_rank(rank, kind, patched):
    """The same of one of two ranks."""
    return measured(lambda model: wrap(kind, model)[0], patched, "backward" if kind == "ZeRO-3" else None)


def line(name, stock, ours):
    """A row of the table."""
    (peak, loss, grads, _), (our_peak, our_loss, our_grads, counts) = stock, ours
    verdict = "streamed" if counts[0] and not any(counts[1:]) else "dense"
    total = sum(float(g.double().norm()) ** 2 for g in grads.values()) ** 0.5
    errors = [
        float((our_grads[key].double() - g.double()).norm()) / max(float(g.double().norm()), 1e-3 * total)
        for key, g in grads.items()
        if key in our_grads and g.shape == our_grads[key].shape
    ]
    gradient = f"{max(errors):.0e}" if errors else "(tests)"
    loss_error = abs(float(our_loss - loss)) / float(loss)
    sizes = f"{peak / 2**20:.1f} | {our_peak / 2**20:.1f} | {our_peak / peak:.2f}"
    return f"| {name} | {verdict} | {loss_error:.0e} | {gradient} | {sizes} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    headings = ("wrapper", "verdict", "loss error", "gradient error", "MiB stock", "patched", "ratio")
    print("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
    compiled = {"torch.compile, fullgraph=True, Inductor": "inductor", "torch.compile, aot_eager": "aot_eager"}
    print(line("none", *(measured(lambda model: model, patched) for patched in (False, True))), flush=True)
    for name, backend in compiled.items():
        build = lambda model, backend=backend: torch.compile(model, backend=backend, fullgraph=True)  # noqa: E731
        print(line(name, *(measured(build, patched) for patched in (False, True))), flush=True)
        torch.compiler.reset()
    for kind in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            found = [run_ranks(2, on_a_rank, folder, kind, patched)[0] for patched in (False, True)]
        print(line(f"{kind}, two ranks", *found), flush=True)
