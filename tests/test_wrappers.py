"""A patched model inside everything that wraps models: loss and every gradient equal the unpatched run's.

Each row of a table is one wrapper. `streamed` says that no logits were made; where they were, the row says 1, and the
reason. Processes of several ranks are in test_launch.py and test_parallel.py, TRL in test_fused_head.py.
"""

import copy
import pickle

import peft
import pytest
import torch
from accelerate import dispatch_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from hf_xent import PatchCallback
from hf_xent.lazy import LazyLogits
from hf_xent.patching import compare, patch, patch_state, patched, unpatch
from support.models import V, add_adapter, assert_same_gradients, batch, checkpointing, gradients, tiny
from support.oracle import Largest

# PEFT advises on merging and saving in these configurations
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LORA = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": False}


def lora(*targets, saved=None, **options):
    config = peft.LoraConfig(target_modules=list(targets), modules_to_save=saved, **{**LORA, **options})
    return peft.get_peft_model(tiny(), config)


def two_adapters():
    model = lora("q_proj", "lm_head")
    model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj", "lm_head"], **{**LORA, "r": 3}))
    model.base_model.set_adapter(["default", "second"])
    return model


def injected():
    return add_adapter(tiny(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))


def prompts(kind):
    options = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(tiny(), kind(**options))


def tuned(kind, *targets, vocabulary=V, **options):
    """Adapters of a kind, none of which does nothing."""
    more = {"target_modules": list(targets)} if targets else {}
    model = tiny(use_cache=False, vocab_size=vocabulary)
    model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **more, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def adalora(*targets):
    return tuned(peft.AdaLoraConfig, *targets, init_r=4, target_r=2, total_step=10)


def adaption_prompts():
    """They keep the model's forward as their own when they are made."""
    return tuned(peft.AdaptionPromptConfig, adapter_len=4, adapter_layers=1)


def frozen_head():
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    return model


def checkpointed(reentrant):
    return checkpointing(tiny(), reentrant)  # its configuration has no dropout


def dispatched():
    """`device_map`: accelerate's hooks stand where the modules' forwards were."""
    model = tiny()
    return dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)


def resized():
    model = patch(tiny())
    model.resize_token_embeddings(V + 7)  # makes another head
    return unpatch(model)


WRAPPERS = {  # how to make it, and how often logits (or a branch of them) are made
    "LoRA inside": (lambda: lora("q_proj", "v_proj"), 0),
    "LoRA on the head": (lambda: lora("lm_head"), 0),
    "LoRA inside and on the head": (lambda: lora("q_proj", "lm_head"), 0),
    "rank-stabilized LoRA on the head": (lambda: lora("lm_head", use_rslora=True), 0),
    "LoRA on the head with a bias": (lambda: lora("lm_head", lora_bias=True), 0),
    "two adapters on the head": (two_adapters, 0),
    "adapter added by transformers": (injected, 0),
    "LoRA on every linear layer": (lambda: lora("q_proj", "k_proj", "up_proj", "down_proj", "lm_head"), 0),
    "modules_to_save=[lm_head]": (lambda: lora("q_proj", saved=["lm_head"]), 0),
    "DoRA inside": (lambda: lora("q_proj", use_dora=True), 0),
    "DoRA on the head": (lambda: lora("lm_head", use_dora=True), 0),  # other adapters: test_adapters
    "AdaLoRA": (lambda: adalora("q_proj", "v_proj"), 0),
    "adaption prompts": (adaption_prompts, 0),
    "VeRA": (lambda: tuned(peft.VeraConfig, "q_proj", r=4), 0),
    "prompt tuning": (lambda: prompts(peft.PromptTuningConfig), 0),
    "prefix tuning": (lambda: prompts(peft.PrefixTuningConfig), 0),
    "tied embeddings": (lambda: tiny("llama tied"), 0),
    "frozen head": (frozen_head, 0),
    "activation checkpointing": (lambda: checkpointed(False), 0),
    "reentrant checkpointing": (lambda: checkpointed(True), 0),
    "device_map": (dispatched, 0),
    "resized embeddings": (resized, 0),
    "torch.compile": (lambda: torch.compile(tiny(), backend="aot_eager"), None),  # runs dense: subclasses do not trace
}


def run(model, **inputs):
    torch.manual_seed(0)
    out = model(**inputs)
    out.loss.backward()
    return out, gradients(model)


def both_ways(model, **inputs):
    """Stock, then patched, on the same inputs; returns the patched output and how often logits were made."""
    stock, stock_grads = run(model, **inputs)
    ours, our_grads = run(patch(model), **inputs)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert_same_gradients(our_grads, stock_grads)
    return ours, patch_state(model)


@pytest.mark.parametrize("name", WRAPPERS)
def test_loss_and_gradients_equal_stock(name):
    build, materialized = WRAPPERS[name]
    ids, labels = batch()
    _, state = both_ways(build(), input_ids=ids, labels=labels)
    if materialized is not None:
        assert (state.streamed, state.materialized) == (int(not materialized), materialized)


@pytest.mark.parametrize("build", [adalora, adaption_prompts])
def test_wrappers_that_call_past_the_hooks_are_left_as_they_were(build):
    model = build("q_proj") if build is adalora else build()
    wrapper, inner = model.base_model, model.get_base_model()
    before = dict(wrapper.__dict__), dict(inner.__dict__)
    patch(model, loss="focal")
    ids, labels = batch()
    model(input_ids=ids, labels=labels)
    assert (patch_state(model).streamed, patch_state(model).bypassed) == (1, 0)
    unpatch(model)
    assert (wrapper.__dict__.keys(), inner.__dict__.keys()) == tuple(places.keys() for places in before)
    assert wrapper.forward == before[0].get("forward", wrapper.forward)


def test_the_users_patch_survives_an_occasion_within_wrappers():
    model = patch(lora("q_proj"), loss="focal")
    state, objective = patch_state(model), model.loss_function
    with patched(model, always=True):
        assert type(model(input_ids=batch()[0]).logits) is LazyLogits
    compare(model)
    assert patch_state(model) is state and model.loss_function is objective and state.streamed == 0


@pytest.mark.parametrize("patched_first", [False, True])
def test_adapters_may_come_before_or_after_the_patch(patched_first):
    ids, labels = batch()
    expected, grads = run(lora("q_proj", "lm_head"), input_ids=ids, labels=labels)
    torch.manual_seed(0)
    model = tiny()
    if patched_first:
        patch(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))
    if not patched_first:
        patch(model)
    out, found = run(model, input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same_gradients(found, grads)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)


def test_adapters_switched_off_merged_and_unloaded():
    model, (ids, labels) = lora("q_proj", "lm_head"), batch()
    base = tiny()(input_ids=ids, labels=labels).loss
    tuned = model(input_ids=ids, labels=labels).loss
    patch(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, base)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, tuned)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, tuned)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids, labels=labels).loss, tuned)
    state = patch_state(merged)
    assert (state.streamed, state.materialized) == (4, 0)
    unpatch(merged)
    assert "forward" not in merged.lm_head.__dict__


def test_lora_on_the_head_in_bfloat16_is_no_worse_than_stock():
    ids, labels = batch()
    exact = lora("q_proj", "lm_head").to(torch.bfloat16).float()
    truth, truth_grads = run(exact, input_ids=ids, labels=labels)
    model = lora("q_proj", "lm_head").to(torch.bfloat16)
    stock, stock_grads = run(model, input_ids=ids, labels=labels)
    ours, our_grads = run(patch(model), input_ids=ids, labels=labels)
    assert patch_state(model).materialized == 0
    assert abs(ours.loss - truth.loss) <= 2 * abs(stock.loss - truth.loss) + 1e-3
    for name, g in truth_grads.items():
        assert (our_grads[name].float() - g).norm() <= 2 * (stock_grads[name].float() - g).norm() + 1e-5


@pytest.mark.parametrize("name", ["LoRA inside and on the head", "modules_to_save=[lm_head]", "tied embeddings"])
def test_autocast(name):
    """bfloat16 matmuls over float32 parameters, as Trainer's `bf16=True` runs them."""
    ids, labels = batch()
    build = WRAPPERS[name][0]
    truth, truth_grads = run(build(), input_ids=ids, labels=labels)
    model = build()

    def mixed(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach(), gradients(model)

    stock, stock_grads = mixed(model)
    ours, our_grads = mixed(patch(model))
    assert patch_state(model).materialized == 0
    assert abs(ours - truth.loss) <= 2 * abs(stock - truth.loss) + 1e-3
    for name, g in truth_grads.items():
        assert our_grads[name].dtype == g.dtype
        assert (our_grads[name] - g).norm() <= 2 * (stock_grads[name] - g).norm() + 1e-4 * g.norm()


def test_a_quantized_base_and_a_quantized_head_stream(tmp_path):
    """QLoRA: a 4-bit base, adapters inside and on the head, which transformers quantizes if it is told to."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    ids, labels = batch()
    tiny(hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(tmp_path)  # blocks are of 64 numbers
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    load = lambda config: AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")  # noqa: E731
    model = peft.get_peft_model(load(four_bits), peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))
    assert "4bit" in type(model.base_model.model.model.layers[0].mlp.up_proj).__name__
    _, state = both_ways(model.eval(), input_ids=ids, labels=labels)
    assert (state.streamed, state.materialized) == (1, 0)
    four_bits.llm_int8_skip_modules = ["q_proj"]  # the head is then no longer spared
    _, state = both_ways(load(four_bits), input_ids=ids, labels=labels)  # more of it: test_quantized
    assert (state.streamed, state.materialized) == (1, 0)
    assert "4bit" in type(load(four_bits).lm_head).__name__


def test_an_adapter_on_the_head_makes_nothing_as_large_as_the_logits():
    """No [tokens, vocabulary] tensor, and no merged weight either: the branch is a second product of the same row."""
    vocabulary, tokens = 3000, 256
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA)
    model = peft.get_peft_model(tiny(vocab_size=vocabulary), config)
    for parameter in model.lm_head.base_layer.parameters():
        parameter.requires_grad_(False)
    patch(model, memory_budget=4 * 8 * vocabulary)
    ids = torch.randint(vocabulary, (8, tokens // 8))
    with Largest() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
    assert largest.numel <= vocabulary * 32 < tokens * vocabulary, "nothing above the embedding itself"
    merged = model.base_model.model.lm_head.base_layer.weight
    assert merged.grad is None and merged.numel() == vocabulary * 32


def of_fsdp(calls):
    """A hook from where FSDP's are; what it does with real ranks is in test_launch."""

    def hook(gradient):
        calls.append(gradient)
        return gradient

    hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    return hook


def test_views_and_hooks_of_wrappers_stream():
    """DDP's `find_unused_parameters` views the outputs as themselves, FSDP hooks their gradients.

    The hook is called before the backward of what was computed from the logits, and before that of the layers below.
    """
    model, (ids, labels) = tiny(), batch()
    expected = model(input_ids=ids).logits
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    logits, calls = patch(model, always=True)(input_ids=ids).logits, []
    logits.register_hook(of_fsdp(calls))
    viewed = logits.view_as(logits)
    ours = F.cross_entropy(viewed[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(ours, loss)
    ours.backward()
    assert patch_state(model).materialized == 0
    assert [gradient.shape for gradient in calls] == [loss.shape, logits.hidden.shape]


def test_device_map_after_the_patch():
    model, (ids, labels) = tiny(), batch()
    expected, grads = run(model, input_ids=ids, labels=labels)
    model = dispatch_model(patch(model), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    out, found = run(model, input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same_gradients(found, grads)
    assert patch_state(model).streamed == 1
    unpatch(model)
    assert type(model(input_ids=ids, labels=labels).logits) is torch.Tensor
    assert type(patch(model)(input_ids=ids, labels=labels).logits) is LazyLogits


def test_copies_and_pickles_of_adapters_use_their_own_weights():
    model, (ids, labels) = patch(lora("q_proj", "lm_head")), batch()
    loss = model(input_ids=ids, labels=labels).loss
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone(input_ids=ids, labels=labels).loss, torch.tensor(V).log())
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, loss)
    assert (patch_state(clone).streamed, patch_state(model).streamed) == (2, 2)
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(input_ids=ids, labels=labels).loss, loss)
    assert patch_state(loaded).materialized == 0


def test_saved_checkpoints_are_the_stock_ones(tmp_path):
    model, (ids, labels) = patch(tiny(), loss="focal"), batch()
    model.save_pretrained(tmp_path / "patched")
    tiny().save_pretrained(tmp_path / "stock")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    adapter = patch(lora("q_proj", "lm_head"))
    expected = adapter(input_ids=ids, labels=labels).loss
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids, labels=labels).loss, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "assistant_model": True},
        {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
    ],
    ids=["greedy", "sampling", "beam", "assisted", "logits"],
)
@pytest.mark.parametrize("name", ["llama", "LoRA"])
def test_generation(name, options):
    ids, _ = batch(rows=1)
    model = tiny() if name == "llama" else lora("q_proj", "lm_head")
    options = {"max_new_tokens": 8, "pad_token_id": 0, **options}
    if options.get("assistant_model"):
        options["assistant_model"] = tiny("llama tied")

    def generate():
        torch.manual_seed(0)
        found = model.generate(input_ids=ids, **options)
        return (
            torch.cat([found.sequences.flatten().float(), *map(torch.flatten, found.logits)])
            if "output_logits" in options
            else found
        )

    expected = generate()
    patch(model)
    assert torch.equal(generate(), expected) and patch_state(model).streamed == 0


def test_packed_sequences():
    """Padding-free batches: several sequences in one row, told apart by their position ids."""
    ids, labels = batch(rows=2)
    packed = {
        "input_ids": ids.reshape(1, -1),
        "labels": torch.where(torch.arange(ids.shape[1]) == 0, -100, labels).reshape(1, -1),
        "position_ids": torch.arange(ids.shape[1]).repeat(2)[None],
        "use_cache": False,  # with a cache transformers does not look for packed rows
    }
    ours, state = both_ways(tiny(), **packed)
    assert state.materialized == 0
    apart = [
        tiny()(input_ids=row[None], labels=y[None]).loss * (y[1:] != -100).sum()
        for row, y in zip(ids, labels, strict=True)
    ]
    torch.testing.assert_close(ours.loss, sum(apart) / (labels[:, 1:] != -100).sum())


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    keep = labels[:, 1:] != -100
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[keep].mean())}


def top(logits, labels):
    return logits.argmax(-1)


def accuracy_of_tops(prediction):
    keep = prediction.label_ids[:, 1:] != -100
    return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:])[keep].mean())}


@pytest.mark.parametrize("preprocess", [None, top])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_with_metrics(preprocess, smoothing, tmp_path):
    ids, labels = batch(rows=6)
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    metrics = accuracy if preprocess is None else accuracy_of_tops

    def evaluate(model):
        arguments = TrainingArguments(
            tmp_path, per_device_eval_batch_size=2, per_device_train_batch_size=2, max_steps=3, report_to="none",
            label_smoothing_factor=smoothing, use_cpu=True, use_liger_kernel=False, disable_tqdm=True, seed=0,
            gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics,
            preprocess_logits_for_metrics=preprocess,
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = trainer.evaluate()
        return losses, found["eval_loss"], found["eval_accuracy"]

    stock = evaluate(tiny())
    model = patch(tiny())
    ours = evaluate(model)
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert ours[1:] == pytest.approx(stock[1:], rel=1e-5)
    state = patch_state(model)
    if smoothing:  # Trainer's label smoother takes whole rows of log-probabilities
        assert state.materialized == 0, "the smoother calls the model without labels"
    else:  # argmax streams; without it the logits of three evaluation batches are gathered
        assert state.materialized == (0 if preprocess else 3)


def trained(model, tmp_path, callback, **options):
    ids, labels = batch(rows=6)
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_steps=1, save_strategy="no", seed=0,
    )  # fmt: skip
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback], **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_callback_puts_the_users_patch_back(tmp_path):
    model = patch(tiny(), loss="focal")
    state, objective = patch_state(model), model.loss_function
    found = trained(model, tmp_path, PatchCallback())
    assert found == pytest.approx(trained(tiny(), tmp_path, PatchCallback()), rel=1e-5), "cross-entropy, as asked for"
    assert patch_state(model) is state and model.loss_function is objective and state.streamed == 0


@pytest.mark.filterwarnings("default:PatchCallback")
def test_the_callback_says_that_it_had_no_effect(tmp_path):
    """A loss computed outside of the model gets its logits with `always`."""

    def outside(out, labels, num_items_in_batch=None):
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with pytest.warns(UserWarning, match="PatchCallback had no effect.*called without labels.*always=True"):
        stock = trained(tiny(), tmp_path, PatchCallback(), compute_loss_func=outside)
    model = tiny()
    ours = trained(model, tmp_path, PatchCallback(always=True), compute_loss_func=outside)
    assert ours == pytest.approx(stock, rel=1e-5)


def test_the_loaded_model_of_a_saved_directory(tmp_path):
    patch(tiny("gemma2 softcap")).save_pretrained(tmp_path)
    ids, labels = batch()
    _, state = both_ways(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), input_ids=ids, labels=labels)
    assert state.materialized == 0 and isinstance(state.streamed, int)


def test_logits_stay_lazy_until_touched():
    model, (ids, labels) = patch(lora("lm_head")), batch()
    out = model(input_ids=ids, labels=labels)
    assert isinstance(out.logits, LazyLogits) and out.logits.raw.adapter is not None
    expected = unpatch(model)(input_ids=ids).logits
    torch.testing.assert_close(out.logits + 0, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("default:PatchCallback", "ignore::FutureWarning")  # of transformers, in what PEFT asks it
def test_an_adapter_that_needs_the_logits_is_said(tmp_path):
    """RoAD mixes the logits of neighboring tokens of the vocabulary."""
    adapted = lambda: tuned(peft.RoadConfig, "lm_head", group_size=4, vocabulary=128)  # noqa: E731
    with pytest.warns(UserWarning, match=r"PatchCallback had no effect: the adapter on the head .peft.tuners.road"):
        trained(adapted(), tmp_path, PatchCallback())
    (ids, labels), model = batch(), patch(adapted(), loss="emo")
    with pytest.raises(RuntimeError, match=r"^EMO\(cost=<128 embeddings>, variant='emo1'.*adapter on the head"):
        model(input_ids=ids, labels=labels)
