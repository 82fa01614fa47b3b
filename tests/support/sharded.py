"""What two ranks run in test_gathered.py: tiny models under ZeRO, FSDP and DDP; and one process to compare with."""

from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hf_xent
from hf_xent import losses
from hf_xent.lazy import LazyLogits
from hf_xent.patching import lazily, patch_state
from support.models import batch, tiny
from support.oracle import Largest

RATE = 1024.0  # of a step whose change of the parameters is read as their gradient, so large that it rounds little


def rows(silent):
    """Four rows of tokens and labels, two for each rank, and the number of labels; a silent second rank has none."""
    ids, labels = batch(rows=4)
    if silent:
        labels[2:] = -100
    return ids, labels, (labels[:, 1:] != -100).sum()


def one_process(name, loss, silent):
    """Loss and gradients of all rows, from dense logits."""
    model, (ids, labels, count) = tiny(name), rows(silent)
    logits, targets = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
    logits, targets = logits[targets != -100], targets[targets != -100]
    weight = model.get_output_embeddings().weight.detach().clone()
    total = losses.get(loss).bind(weight).reference(logits, targets, weight=weight).sum() / count
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}


def loss_of(model, loss, where, rank, silent):
    """The loss of this rank's rows, such that the mean over ranks is that of all rows, and where it is computed."""
    ids, labels, count = rows(silent)
    mine = slice(2 * rank, 2 * rank + 2)
    ids, labels = ids[mine], labels[mine]
    if where == "model":
        return model(input_ids=ids, labels=labels, num_items_in_batch=count).loss * 2
    with lazily(model):
        logits = model(input_ids=ids).logits
    assert isinstance(logits, LazyLogits) and not logits.is_dense
    if where == "function":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count * 2
    if where == "dense":
        total = F.cross_entropy(logits.dense()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / count * 2
    if where == "statistics":
        stats = logits.stats(labels, shift=True)
        return losses.get(loss).of(stats).masked_fill(~stats.mask, 0).sum() / count * 2
    head, targets = logits.head, F.pad(labels, (0, 1), value=-100)[:, 1:]
    return losses.get(loss).bind(head.weight.detach())(logits.hidden, head, targets, num_items=count) * 2


def patched(name, loss, where):
    return hf_xent.patch(tiny(name), loss=loss if where == "model" else None)


def mean_over_ranks(loss):
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / 2


def result(model, loss, grads):
    state = patch_state(model)
    return mean_over_ranks(loss), grads, (state.streamed, state.materialized, state.bypassed), state.reason


def zero(rank, loss, where, name="llama", silent=False, stage=3, direct=False):
    """DeepSpeed's ZeRO; the backward is called directly, or by the engine."""
    from deepspeed.utils import safe_get_full_grad

    engine = deepspeed_engine(patched(name, loss, where), stage)
    found = loss_of(engine, loss, where, rank, silent)
    found.backward() if direct else engine.backward(found)
    grads = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
    engine.step()
    # DeepSpeed gathers what is read outside of its layer's call, and keeps it for the whole forward from then on
    assert not any(getattr(m, "_external_params", None) for m in engine.module.modules())
    return result(engine, found, grads)


ZERO = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 100_000}


def deepspeed_engine(model, stage=3, **more):
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **ZERO},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def in_fsdp1(model, apart, original=True, **more):
    """FSDP1 with units of the decoder layers and of the modules of these names."""
    units = {m for name, m in model.named_modules() if name.endswith(apart)}
    chosen = lambda m: isinstance(m, LlamaDecoderLayer) or m in units  # noqa: E731
    policy = partial(lambda_auto_wrap_policy, lambda_fn=chosen)
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu"), **more)


def fsdp1(rank, loss, where, name="llama", silent=False, apart=("lm_head",), original=True, patched_first=True):
    """FSDP1, with the head in a unit of its own, or in that of the root."""
    model = tiny(name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if patched_first:
        model = patched(name, loss, where)
    model = in_fsdp1(model, apart, original)
    if not patched_first:
        hf_xent.patch(model, loss=loss if where == "model" else None)
    found = loss_of(model, loss, where, rank, silent)
    found.backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    with FSDP.summon_full_params(model):
        after = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
        grads = {name: (value - after[name].detach()) / RATE for name, value in before.items()}
    return result(model, found, grads)


def in_fsdp2(model):
    """FSDP2, with each decoder layer and the head apart."""
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    return model


def fsdp2(rank, loss, where, name="llama", silent=False):
    model = in_fsdp2(patched(name, loss, where))
    found = loss_of(model, loss, where, rank, silent)
    found.backward()
    return result(model, found, {name: p.grad.full_tensor() for name, p in model.named_parameters()})


def ddp(rank, loss, where, name="llama", silent=False):
    model = DistributedDataParallel(patched(name, loss, where))
    found = loss_of(model, loss, where, rank, silent)
    found.backward()
    return result(model, found, {name: p.grad for name, p in model.module.named_parameters()})


def wrap(kind, model, sixteen_bits=False):
    """The model under ZeRO-3, or FSDP1 with the head in the root's unit or its own; and its step on a loss."""
    if kind == "ZeRO-3":
        engine = deepspeed_engine(model, **({"bf16": {"enabled": True}} if sixteen_bits else {}))

        def step(loss):
            engine.backward(loss)
            engine.step()

        return engine, step
    heads = [name for name, m in model.named_modules() if "lm_head" in name and isinstance(m, nn.Linear)]
    leaves = tuple(name for name in heads if kind == "FSDP1, head apart" or "lora_" in name)
    more = {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)} if sixteen_bits else {}
    wrapped = in_fsdp1(model, leaves, **more)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, step


def training(rank, kind, change):
    """Three steps, an evaluation and logits; and how often results were streamed."""
    model, step = wrap(kind, hf_xent.patch(change(tiny())))
    (ids, labels), found, mine = batch(rows=4), [], slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        out = model(input_ids=ids[mine], labels=labels[mine])
        found += [mean_over_ranks(out.loss), out.logits.argmax(-1)]
        step(out.loss)
    with pytest.raises(RuntimeError, match="modified in place since"):
        out.logits.argmax(-1)
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
        found += [out.loss, out.logits.argmax(-1), out.logits + 0, model(input_ids=ids).logits]
    state = patch_state(model)
    return [x.detach().clone() for x in found], (state.streamed, state.materialized, state.bypassed)


def stock_training(rank, change):
    """The same of a stock model in one process that has the rows of both ranks."""
    model, (ids, labels), found = change(tiny()), batch(rows=4), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        outs = [model(input_ids=ids[half], labels=labels[half]) for half in (slice(0, 2), slice(2, 4))]
        loss = (outs[0].loss + outs[1].loss) / 2
        found += [loss.detach(), outs[rank].logits.argmax(-1)]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    return [*found, out.loss, out.logits.argmax(-1), out.logits, out.logits]


def sixteen_bits(rank, kind):
    """Losses of two steps: stock and patched in bfloat16, and stock in float32; and how often ours streamed."""
    found, ids, labels = [], *batch(rows=4)
    mine = slice(2 * rank, 2 * rank + 2)
    models = [tiny(), hf_xent.patch(tiny()), tiny()]
    for model, low in zip(models, (True, True, False), strict=True):
        wrapped, step = wrap(kind, model, low)
        for _ in range(2):
            loss = wrapped(input_ids=ids[mine], labels=labels[mine]).loss
            found.append(mean_over_ranks(loss).double())
            step(loss)
    state = patch_state(models[1])
    return found[:2], found[2:4], found[4:], (state.streamed, state.materialized, state.bypassed)


def largest(rank, kind):
    """The number of elements of the largest tensor in a step, and that of all parameters."""
    model = hf_xent.patch(tiny(vocab_size=3000), memory_budget=4 * 8 * 3000)
    parameters = sum(p.numel() for p in model.parameters())
    model, _ = wrap(kind, model)
    ids = torch.randint(3000, (8, 32))
    with Largest() as watch:
        loss = model(input_ids=ids, labels=ids).loss
        model.backward(loss) if kind == "ZeRO-3" else loss.backward()
    return watch.numel, parameters


def unit_with_more(rank):
    """A loss of BERT, stock and patched, whose head FSDP frees together with the layer before it."""
    found = []
    for patch in (False, True):
        model, (ids, labels) = tiny("bert bias", tie_word_embeddings=False), batch(rows=2)
        if patch:
            hf_xent.patch(model)
        model = in_fsdp1(model, ("cls",))
        found.append(model(input_ids=ids, labels=labels).loss.detach())
    state = patch_state(model)
    return *found, (state.streamed, state.bypassed), state.reason


def trainer(rank, folder):
    """Histories under ZeRO-3 of transformers' Trainer and of ours, under cross-entropy and EMO."""
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, **ZERO},
        "zero_allow_untested_optimizer": True,
    }
    options = {
        "max_steps": 3, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 1e-2, "save_strategy": "no", "deepspeed": settings, "seed": 0,
    }  # fmt: skip
    ids, labels = batch(rows=8)
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    found = {}
    for loss in ("stock", "cross_entropy", "emo"):
        more = {} if loss == "stock" else {"loss": loss}
        arguments = (hf_xent.XentConfig if more else TrainingArguments)(f"{folder}/{rank}", **options, **more)
        model = tiny()  # sharded as it is made, since there is a configuration of ZeRO-3 now
        run = (hf_xent.XentTrainer if more else Trainer)(model, arguments, train_dataset=data, eval_dataset=data)
        run.train()
        logs = [(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry]
        evaluated = run.evaluate()["eval_loss"]
        state = patch_state(model) if more else None
        counts = None if state is None else (state.streamed, state.materialized, state.bypassed)
        found[loss] = logs, evaluated, counts
    return found
