"""The table of heads that are not plain: `python -m support.head_table`, run in tests/ with the package on PYTHONPATH.

Each row of test_adapters and test_quantized: what a patched model does, how far its loss and gradients are from the
stock model's, with the head in float64 where that can be had, and what both allocate at their peak. The vocabulary has
16384 tokens there, and there are 255 of them in a batch; the budget is eight rows of float32 logits, of 64 KiB each.
"""

import warnings
from importlib.metadata import version

import torch

import test_adapters
import test_quantized
from hf_xent.patching import compare, patch, patch_state, unpatch
from support.models import gradients
from support.oracle import peak_bytes

SIZE, LENGTH = 16384, 85
BUDGET = 8 * 4 * SIZE
SLOW = (
    "orthogonal",
    "AdaMSS",
    "SHiRA",
    "OSF",
    "PSOFT",
    "TinyLoRA",
)  # decompositions of the weight: seconds at that size


def builders():
    """Name -> what makes the model."""
    rows = {name: build for name, build in test_adapters.STREAMED.items() if name not in SLOW}
    rows |= {name: build for name, (build, _) in test_adapters.DENSE.items() if name not in SLOW}
    for name, layer in test_quantized.LAYERS.items():
        rows[name] = lambda layer=layer: test_quantized.model_with(layer(vocabulary=SIZE))
    return rows


def run(model):
    """Loss and gradients."""
    torch.manual_seed(0)
    out = model(**test_adapters.batch())
    out.loss.backward()
    return out.loss.detach(), gradients(model)


def row(name, build):
    """A line of the table."""
    plain, model = build(), patch(build(), memory_budget=BUDGET)
    loss, expected = run(plain)
    stock = peak_bytes(lambda: run(plain))
    found_loss, found = run(model)
    state = patch_state(model)
    verdict = "streamed" if state.streamed and not (state.materialized or state.bypassed) else "dense"
    ours = peak_bytes(lambda: run(model))
    total = sum(float(g.double().norm()) ** 2 for g in expected.values()) ** 0.5
    errors = [
        float((found[key].double() - g.double()).norm()) / max(float(g.double().norm()), 1e-3 * total)
        for key, g in expected.items()
    ]
    exact = compare(unpatch(build())).exact_gradient_error
    in_float64 = "" if exact is None else f"{exact:.0e}"
    loss_error = abs(float(found_loss - loss)) / float(loss)
    sizes = f"{stock / 2**20:.0f} | {ours / 2**20:.0f} | {ours / stock:.2f}"
    return f"| {name} | {verdict} | {loss_error:.0e} | {max(errors):.0e} | {in_float64} | {sizes} |"


ABOUT = """# Heads that are not plain

Made by `python -m support.head_table > ../benchmarks/results/heads.md` in `tests/`; {versions}.

What a patched model does where its head has an adapter of PEFT, a parametrization or a quantized weight: tiny models
with D=32 (64 if quantized), V=16384, 255 tokens, float32, on a CPU; eight rows of logits in memory at a time. Errors
are those of the loss and of the worst parameter's gradient relative to the stock model's; 'in float64' is the
gradient's with the head and the loss in float64, where it can run so. The peaks are those of one forward and
backward, the gradients included.
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    names = ("torch", "transformers", "peft", "bitsandbytes", "torchao")
    print(ABOUT.format(versions=", ".join(f"{name} {version(name)}" for name in names)))
    test_adapters.V, test_adapters.LENGTH = SIZE, LENGTH
    for heading in ("head", "verdict", "loss error", "gradient error", "in float64", "MiB stock", "patched", "ratio"):
        print(f"| {heading} ", end="")
    print("|\n" + "|---" * 8 + "|")
    for name, build in builders().items():
        try:
            print(row(name, build), flush=True)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error)[:80]} |", flush=True)
