"""Heads whose weight is there during their call only: streamed, and equal to one process that has all weights.

Two gloo processes, launched once, run ZeRO-3, FSDP1, FSDP2 and DDP; accelerate's offloading needs one.
"""

from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hf_xent
from hf_xent import losses
from hf_xent.lazy import LazyLogits
from hf_xent.patching import lazily, patch_state
from support.models import batch, tiny

RATE = 1024.0  # of a step whose change of the parameters is read as their gradient, so large that it rounds little


def rows(silent):
    """Four rows of tokens and labels, two for each rank; those of a silent second rank have no label."""
    ids, labels = batch(rows=4)
    if silent:
        labels[2:] = -100
    return ids, labels, (labels[:, 1:] != -100).sum()


def one_process(name, loss, silent):
    """Loss and gradients of all rows, from dense logits."""
    model, (ids, labels, count) = tiny(name), rows(silent)
    logits, targets = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
    valid = targets != -100
    if loss is None:
        total = F.cross_entropy(logits[valid].float(), targets[valid], reduction="sum")
    else:
        weight = model.lm_head.weight.detach().clone()
        total = losses.get(loss).bind(weight).reference(logits[valid].float(), targets[valid], weight=weight).sum()
    (total / count).backward()
    return (total / count).detach(), {name: p.grad for name, p in model.named_parameters()}


def loss_of(model, loss, how, rank, silent):
    """The loss of this rank's rows, such that the mean over ranks is that of all rows."""
    ids, labels, count = rows(silent)
    mine = slice(2 * rank, 2 * rank + 2)
    ids, labels = ids[mine], labels[mine]
    if how == "inside":
        return model(input_ids=ids, labels=labels, num_items_in_batch=count).loss * 2
    with lazily(model):
        logits = model(input_ids=ids).logits
    assert isinstance(logits, LazyLogits) and not logits.is_dense
    if how == "function":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count * 2
    if how == "statistics":
        stats = logits.stats(labels, shift=True)
        return losses.get(loss).of(stats).masked_fill(~stats.mask, 0).sum() / count * 2
    head, targets = logits.head, F.pad(labels, (0, 1), value=-100)[:, 1:]
    return losses.get(loss).bind(head.weight.detach())(logits.hidden, head, targets, num_items=count) * 2


def mean_over_ranks(loss):
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / 2


def changes(before, after):
    return {name: (value - after[name]) / RATE for name, value in before.items()}


def fsdp1(rank, name, loss, how, silent, head_apart, original, patched_first=True):
    """FSDP1, with the head in the root's unit or in its own."""
    model = tiny(name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    if patched_first:
        hf_xent.patch(model, loss=loss if how == "inside" else None)
    apart = lambda m: isinstance(m, LlamaDecoderLayer) or (head_apart and m is model.lm_head)  # noqa: E731
    model = FSDP(model, auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=apart), **options)
    if not patched_first:
        hf_xent.patch(model, loss=loss if how == "inside" else None)
    found = loss_of(model, loss, how, rank, silent)
    found.backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    with FSDP.summon_full_params(model):
        after = {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}
    return model, mean_over_ranks(found), changes(before, after)


def fsdp2(rank, name, loss, how, silent):
    model = hf_xent.patch(tiny(name), loss=loss if how == "inside" else None)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    found = loss_of(model, loss, how, rank, silent)
    found.backward()
    return model, mean_over_ranks(found), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def ddp(rank, name, loss, how, silent):
    model = DistributedDataParallel(hf_xent.patch(tiny(name), loss=loss if how == "inside" else None))
    found = loss_of(model, loss, how, rank, silent)
    found.backward()
    return model, mean_over_ranks(found), {name: p.grad for name, p in model.module.named_parameters()}


def zero(rank, name, loss, how, silent, stage=3, direct=False):
    """DeepSpeed, whose backward is called directly or by the engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = hf_xent.patch(tiny(name), loss=loss if how == "inside" else None)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings
    )
    found = loss_of(engine, loss, how, rank, silent)
    found.backward() if direct else engine.backward(found)
    grads = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
    engine.step()
    return engine, mean_over_ranks(found), grads


def wrap(kind, model):
    """The model in a wrapper, and its step on a loss."""
    if kind == "ZeRO-3":
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=settings)

        def step(loss):
            engine.backward(loss)
            engine.step()

        return engine, step
    leaves = {m for n, m in model.named_modules() if n.endswith("lm_head") or ("lora_" in n and not [*m.children()])}
    chosen = lambda m: isinstance(m, LlamaDecoderLayer) or (m in leaves and isinstance(m, torch.nn.Linear))  # noqa: E731
    wrapped = FSDP(
        model,
        auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=chosen),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, step


def history(model, step, mine, patched):
    """What training, evaluation and reading of logits give."""
    ids, labels = batch(rows=4)
    found = []
    for _ in range(3):
        out = model(input_ids=ids[mine], labels=labels[mine])
        found.append(mean_over_ranks(out.loss) if patched else out.loss.detach())
        if patched:
            assert (out.logits[:, :-1].argmax(-1) < 97).all()  # in the midst of a step
        step(out.loss)
    if patched:
        with pytest.raises(RuntimeError, match="weight was modified in place"):
            out.logits.argmax(-1)
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
        found += [out.loss, out.logits.argmax(-1), out.logits + 0, model(input_ids=ids).logits]
    return [x.detach().clone() for x in found]


def training(rank, kind, change):
    """Three steps, an evaluation and logits, patched and wrapped."""
    model, step = wrap(kind, hf_xent.patch(change(tiny())))
    found = history(model, step, slice(2 * rank, 2 * rank + 2), True)
    return found, patch_state(model)


CASES = {  # function, model, loss, where it is computed, whether the second rank has no label, further arguments
    "ZeRO-3": (zero, "llama", None, "inside", False),
    "ZeRO-3, EMO": (zero, "llama", "emo", "inside", False),
}
