"""What a teacher's cache takes per token, and what its form does to distillation, on real text.

The student q is the teacher with noise in its weights. `error of p` is KL(p || p') between the teacher's distribution p
and the stored one, nats per token. The loss is the forward KL from the student, whose gradient by its logits is q - p',
so the gradient's error is |p - p'| / |p - q| over all tokens. `class` makes all tokens that are not stored one class
more, `uniform` spreads their mass.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_xent.data import load_text, pack
from hf_xent.losses.targets import TopK
from hf_xent.models import loading
from hf_xent.teachers import LocalTeacher, StoredTeacher, write_cache

FILE = Path("benchmarks/results/teacher-caches.md")
FORMS = (
    {"kind": "hidden", "dtype": "float16"},
    {"kind": "hidden", "dtype": "int8"},
    *({"kind": "top_k", "k": k, "dtype": "float16"} for k in (1, 16, 64)),
    {"kind": "top_k", "k": 64, "dtype": "float32"},
)


def page(model: str, data: str, documents: int, length: int, noise: float) -> str:
    """The table, as Markdown."""
    teacher, tokenizer = loading.load(model, torch.float32)
    blocks = pack(load_text(data), tokenizer, length).select(range(documents))
    ids = torch.tensor(blocks["input_ids"][:])
    p = _logp(LocalTeacher(teacher), ids)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number, form in enumerate(FORMS):
            written = write_cache(LocalTeacher(teacher), blocks, Path(folder, str(number)), **form)
            stored = StoredTeacher.from_folder(written.folder).targets({"input_ids": ids})
            lines.append((form, written, stored))
        hidden, head = LocalTeacher(teacher).targets({"input_ids": ids})
        _disturb(teacher, noise)
        q = _logp(LocalTeacher(teacher), ids)
        rows = [_row(form, written, stored, p, q) for form, written, stored in lines]
    control = _measured(head.logits(hidden.bfloat16().float()).double().log_softmax(-1), p, q)
    rows.append(_line("bfloat16 hidden states, not stored", "", *control))
    true = float((p.exp() * (p - q)).sum(-1).mean())
    return f"""# Caches of a teacher

{model}, {ids.numel()} tokens of {data} in documents of {length} tokens. The student is the same model with noise of
{noise:g} times their root mean square in its weights (seed 0): KL(p || q) is {true:.4f} nats per token.
`error of p` is KL(p || p') of the stored distribution p'; the gradient's error is relative, by the student's logits.
`class` makes all tokens that are not stored one class more, `uniform` spreads their mass. The head beside hidden states
is stored once and not counted. `python -m benchmarks caches` makes this page.

| stored | bytes per token | error of p, nats | loss - KL, nats | relative | error of the gradient |
|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
"""


def _disturb(model: Any, noise: float) -> None:
    """Noise in the matrices of all layers, in proportion to their size; the head, which is the embedding, stays."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.base_model.layers:
            for weight in layer.parameters():
                if weight.ndim > 1:
                    draw = torch.randn(weight.shape, generator=generator)
                    weight += draw * (noise * weight.square().mean().sqrt())


def _logp(teacher: LocalTeacher, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T, V], float64."""
    hidden, head = teacher.targets({"input_ids": ids})
    return head.logits(hidden).double().log_softmax(-1)


def _row(form: dict[str, Any], written: Any, stored: Any, p: Tensor, q: Tensor) -> str:
    size = f"{written.cache.form.bytes_per_token(576)} ({written.bytes_per_token:.1f} in files)"
    if isinstance(stored, TopK):
        rows = [
            _line(f"top {form['k']} {form['dtype']}, {tail}", size, *_top_k(stored, tail, p, q))
            for tail in ("class", "uniform")
        ]
        return "\n".join(rows)
    hidden, head = stored
    found = head.logits(hidden).double().log_softmax(-1)
    return _line(f"hidden {form['dtype']}", size, *_measured(found, p, q))


def _line(name: str, size: str, error: float | None, loss: float, relative: float, gradient: float) -> str:
    first = "" if error is None else f"{error:.1e}"
    return f"| {name} | {size} | {first} | {loss:+.1e} | {relative:.1e} | {gradient:.1e} |"


def _measured(found: Tensor, p: Tensor, q: Tensor) -> tuple[float, float, float, float]:
    """Error of p, of the loss, and of the gradient, for a stored distribution."""
    true, loss = ((x.exp() * (x - q)).sum(-1).mean() for x in (p, found))
    error = (p.exp() * (p - found)).sum(-1).mean()
    gradient = (p.exp() - found.exp()).norm() / (p.exp() - q.exp()).norm()
    return float(error), float(loss - true), float((loss - true).abs() / true), float(gradient)


def _top_k(stored: TopK, tail: str, p: Tensor, q: Tensor) -> tuple[float | None, float, float, float]:
    """As `_measured`, with the mass of all other tokens as a class of its own, or spread uniformly."""
    top, rest = stored.logp.double(), stored.rest.double()
    others = torch.ones_like(q, dtype=torch.bool).scatter(-1, stored.ids, False)
    if tail == "uniform":
        spread = rest - torch.tensor(float(q.shape[-1] - top.shape[-1]), dtype=torch.float64).log()
        return _measured(spread[..., None].expand_as(q).scatter(-1, stored.ids, top), p, q)
    left = q.masked_fill(~others, -torch.inf).logsumexp(-1)
    loss = (top.exp() * (top - q.gather(-1, stored.ids))).sum(-1) + rest.exp() * (rest - left)
    true = (p.exp() * (p - q)).sum(-1).mean()
    target = (rest - left)[..., None].exp() * q.exp()  # what the gradient of this loss has in the place of p
    target = target.scatter(-1, stored.ids, top.exp())
    gradient = (p.exp() - target).norm() / (p.exp() - q.exp()).norm()
    difference = loss.mean() - true
    return None, float(difference), float(difference.abs() / true), float(gradient)
