"""Sequences split over two ranks: loss, gradients and logged means are those of one rank.

One launch of two gloo processes splits by hand, and trains under accelerate's context parallelism with FSDP2; only its
ring attention, which has no kernel on a CPU, is replaced. Two slow ones, of two and of four, train under Ulysses,
DeepSpeed's sequence parallelism. accelerate pairs both with GPUs: on these ranks it is told that gloo is their backend.
"""

import os

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_xent
from hf_xent.patching import patch_state
from support.models import V, batch, gradients, tiny
from support.oracle import assert_close_at_scale
from support.ranks import run_ranks
from support.split_attention import gathered_attention

T = 12
ORDERS = {"contiguous": (range(6), range(6, 12)), "head and tail": ((0, 1, 2, 9, 10, 11), range(3, 9))}
MASKED = {"labels on both ranks": (2, 0), "one rank without labels": (6, 8), "no labels": (T, T)}
LOSSES = (None, "emo", "tailr:gamma=0.5", "cross_entropy:label_smoothing=0.1, z_loss=0.01", "comp_sum:tau=0.5")
SPLITS = [(loss, "contiguous", "labels on both ranks") for loss in LOSSES]
SPLITS += [(None, "head and tail", "labels on both ranks"), ("emo", "head and tail", "one rank without labels")]
SPLITS += [(loss, "contiguous", masked) for loss in (None, "emo") for masked in list(MASKED)[1:]]


def rows(masked):
    """Ids and labels [2, T]; the first positions of each row have no label."""
    ids, _ = batch(2, T)
    labels = ids.clone()
    for row, count in zip(labels, MASKED[masked], strict=True):
        row[:count] = -100
    return ids, labels


def alone(loss, masked):
    """The loss and all gradients of one process, from whole sequences, which the model shifts."""
    ids, labels = rows(masked)
    model = hf_xent.patch(tiny(), loss, observe=("entropy", "top"))
    count = (labels[:, 1:] != -100).sum().clamp(min=1)
    value = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
    value.backward()
    return value.detach(), gradients(model), patch_state(model).sums


def by_hand(loss, order, masked):
    """The same from this rank's positions, summed over the ranks."""
    ids, labels = rows(masked)
    own = torch.tensor([*ORDERS[order][dist.get_rank()]])
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (shifted != -100).sum().clamp(min=1)
    model = hf_xent.patch(tiny(), loss, observe=("entropy", "top"))
    positions = own.expand(2, -1)
    value = model(
        input_ids=ids[:, own],
        position_ids=positions,
        labels=shifted[:, own],
        shift_labels=shifted[:, own],
        num_items_in_batch=count,
    ).loss
    value.backward()
    state = patch_state(model)
    assert (state.streamed, state.materialized) == (1, 0)
    total, found = value.detach(), gradients(model)
    for x in (total, *found.values()):
        dist.all_reduce(x)
    return total, found, state.sums


def collate(examples):
    return {name: torch.tensor([row[name] for row in examples]) for name in examples[0]}


def examples():
    """Rows with few labels and many: means of batches are not the mean of their tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for masked in (7, 11, 0, 3) * 2:
        ids = torch.randint(3, V, (T,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "position_ids": [*range(T)]})
    return found


def trained(folder, rows_a_step, loss="cross_entropy", **options):
    """The log of two steps and an evaluation, and the weights after them."""
    model = tiny(num_key_value_heads=2)
    args = hf_xent.XentConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=rows_a_step, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], save_strategy="no", remove_unused_columns=False, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=1e9, train_sampling_strategy="sequential",
        dataloader_pin_memory=False, loss=loss, disable_tqdm=True, per_device_eval_batch_size=2, **options,
    )  # fmt: skip
    kwargs = {"train_dataset": examples(), "eval_dataset": examples()[:2], "data_collator": collate}
    trainer = hf_xent.XentTrainer(model, args, **kwargs)
    trainer.train()
    metrics = trainer.evaluate()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
    return log, metrics, {name.replace("_fsdp_wrapped_module.", ""): p.detach() for name, p in weights.items()}


def on_gloo(**environment):
    """Tell accelerate that these ranks have a backend; it would take them for processes of their own."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", **environment}
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def refusals(folder, config):
    """What is said where a loss cannot be computed from parts of sequences."""
    found = []
    for trainer, arguments in (
        (hf_xent.XentTrainer, {"compute_loss_func": lambda *_, **__: 0}),
        (hf_xent.NoiseFiTTrainer, {}),
        (hf_xent.XentTrainer, {"loss": "eisl"}),
    ):
        args = trainer.config_class(output_dir=str(folder), report_to=[], parallelism_config=config)
        with pytest.raises(ValueError) as error:
            trainer(tiny(), args, train_dataset=examples(), data_collator=collate, **arguments)
        found.append(str(error.value))
    return found


def contexts(rank, folder):
    from accelerate import ParallelismConfig

    ALL_ATTENTION_FUNCTIONS["sdpa"] = gathered_attention
    found = {case: by_hand(*case) for case in SPLITS}
    model, (ids, labels) = hf_xent.patch(tiny()), rows("labels on both ranks")
    positions = torch.arange(T).repeat(2, 1)
    mesh = init_device_mesh("cpu", (2,))
    split = context_parallel(mesh, buffers=[ids, labels, positions], buffer_seq_dims=[1, 1, 1])
    with split, pytest.raises(ValueError) as error:
        model(input_ids=ids, labels=labels)
    found["unshifted"] = str(error.value)
    assert torch.isfinite(model(input_ids=ids, labels=labels).loss)  # whole sequences again
    on_gloo(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    config = ParallelismConfig(cp_size=2)
    found["trained"] = trained(folder / "cp", 2, parallelism_config=config)
    found["trained emo"] = trained(folder / "emo", 1, loss="emo", parallelism_config=config)
    return found | {"refused": refusals(folder, config)}


def ulysses(rank, folder):
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    on_gloo(ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu")
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    replicas = dist.get_world_size() // 2  # each has a sequence on two ranks
    config = ParallelismConfig(sp_size=2, dp_shard_size=replicas, sp_backend="deepspeed", sp_handler=handler)
    engine = {
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    options = {"parallelism_config": config, "deepspeed": engine}
    found = {"trained": trained(folder / "sp", 2 // replicas, **options)}
    model, (ids, labels) = hf_xent.patch(tiny()).train(), rows("labels on both ranks")
    with pytest.raises(ValueError) as error:
        model(input_ids=ids, labels=labels)
    found["unshifted"] = str(error.value)
    return found


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The first launch."""
    folder = tmp_path_factory.mktemp("contexts")
    return run_ranks(2, contexts, folder, folder)


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_parts_of_sequences_add_up(case, launched):
    loss, _, masked = case
    value, grads, sums = alone(loss, masked)
    for rank in launched:
        total, found, _ = rank[case]
        torch.testing.assert_close(total, value)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert_close_at_scale(found[name], grad, 1e-5, name)
    for key, one in sums.items():
        for name, number in one.items():
            torch.testing.assert_close(sum(rank[case][2][key][name] for rank in launched), number)


def compare(found, expected):
    """Logs, evaluations and weights."""
    for theirs, ours in zip(found[0], expected[0], strict=True):
        for name in ("loss", "grad_norm", "perplexity", "mean_token_accuracy", "entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
    for name in ("eval_perplexity", "eval_mean_token_accuracy", "eval_entropy"):
        assert found[1][name] == pytest.approx(expected[1][name], rel=1e-4), name
    for name, weight in expected[2].items():
        assert_close_at_scale(found[2][name], weight, 1e-5, name)


@pytest.mark.parametrize(("key", "loss", "rows_a_step"), [("trained", "cross_entropy", 2), ("trained emo", "emo", 1)])
def test_context_parallelism_trains_as_one_rank(key, loss, rows_a_step, launched, tmp_path):
    expected = trained(tmp_path, rows_a_step, loss, use_cpu=True)
    for rank in launched:
        compare(rank[key], expected)


def test_losses_of_whole_sequences_are_refused(launched):
    said = [launched[0]["unshifted"], *launched[0]["refused"]]
    parts = (
        ("labels", "shift_labels", "context_parallel"),
        ("compute_loss_func", "cp_size=2"),
        ("NoiseFiT", "cp_size=2"),
        ("EISL", "cp_size=2"),
    )
    for message, expected in zip(said, parts, strict=True):
        assert all(part in message for part in expected) and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ulysses_trains_as_one_rank(world, tmp_path):
    """One launch: two ranks with a sequence, or two such pairs."""
    pytest.importorskip("deepspeed", reason="Ulysses is DeepSpeed's")
    expected = trained(tmp_path / "one", 2, use_cpu=True)
    for rank in run_ranks(world, ulysses, tmp_path, tmp_path):
        compare(rank["trained"], expected)
        assert "shift_labels" in rank["unshifted"] and "sp_size=2" in rank["unshifted"]
