"""TRL's fused head answered by a patched model: outputs as of dense logits, and its trainers log what they did before.

What TRL's own tests of `add_fused_lm_head` ask for is asked here of the patched model: values and gradients against the
full logits, ignored positions zero, shifted labels, `num_items_in_batch`, temperature, softcap and scales, the
auxiliary loss, batches without labels, prompt learning, generation untouched; and where TRL refuses or errs, the right
answer.
"""

import copy
import warnings
from types import MethodType

import datasets
import peft
import pytest
import torch
import trl
from packaging.version import Version
from transformers import AutoModelForCausalLM

import hf_xent
from hf_xent.patching import patch, patch_state, unpatch
from hf_xent.patching.trl import STATISTICS, FusedHead
from support.models import V, add_adapter, assert_same_gradients, batch, gradients, tiny, tiny_tokenizer

if Version(trl.__version__) < Version("1.16"):
    pytest.skip("TRL's fused head came with 1.15 and runs on CPUs from 1.16 on", allow_module_level=True)

from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


def dense(model, ids, labels, temperature=1.0, shifted=False, **inputs):
    """TRL's outputs by their definitions, of the unpatched model's logits."""
    logits = model(input_ids=ids, **inputs).logits.float() / temperature
    logits, labels = (logits, labels) if shifted else (logits[:, :-1], labels[:, 1:])
    mask = labels != -100
    logp = logits.log_softmax(-1)
    found = {
        "log_probs": logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": logp.exp().square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
    }
    return {name: torch.where(mask, x, torch.zeros_like(x)) for name, x in found.items()} | {"label_mask": mask}


def assert_equal(out, expected):
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name", ["llama", "gemma2 softcap", "granite scale", "cohere scale", "bert bias", "llama tied"]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_dense_logits(name, temperature):
    model, (ids, labels) = tiny(name), batch()
    expected = dense(model, ids, labels, temperature)
    add_fused_lm_head(model, temperature=temperature, outputs=tuple(STATISTICS))
    out = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert isinstance(out, FusedCausalLMOutput)
    assert_equal(out, {k: v.detach() for k, v in expected.items()})
    torch.testing.assert_close(out.loss, -expected["log_probs"].sum() / expected["label_mask"].sum())
    upstream = torch.randn(expected["log_probs"].shape)
    (expected["log_probs"] * upstream + 0.3 * expected["entropy"] * upstream.flip(0)).sum().backward()
    stock = gradients(model)
    (out.log_probs * upstream + 0.3 * out.entropy * upstream.flip(0)).sum().backward()
    assert_same_gradients(gradients(model), stock, rtol=1e-4)
    assert not any(getattr(out, n).requires_grad for n in ("log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"))
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)


def test_only_what_was_asked_for_is_there():
    model, (ids, labels) = tiny(), batch()
    add_fused_lm_head(model)
    out = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert out.log_probs is not None and all(getattr(out, n) is None for n in STATISTICS if n != "log_probs")
    out = patch(tiny())(input_ids=ids, labels=labels, fused_lm_head=True)  # without TRL's forward: everything
    assert all(getattr(out, n) is not None for n in STATISTICS)


def test_equals_trls_own_kernel():
    model, (ids, labels) = tiny("gemma2 softcap"), batch()
    add_fused_lm_head(model, temperature=1.3, outputs=tuple(STATISTICS))
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    ours = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert_equal(ours, {k: v for k, v in theirs.items() if v is not None})
    assert ours.keys() == theirs.keys()


def test_shifted_labels_items_and_empty_batches():
    model, (ids, labels) = tiny(), batch()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = dense(model, ids, shifted, shifted=True)
    patch(model)
    out = model(input_ids=ids, shift_labels=shifted, num_items_in_batch=torch.tensor(50), fused_lm_head=True)
    assert_equal(out, expected)
    torch.testing.assert_close(out.loss, -expected["log_probs"].sum() / 50)
    empty = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert empty.loss == 0 and empty.log_probs.shape == (3, 10) and not empty.label_mask.any()
    empty.loss.backward()
    assert all(g.abs().max() == 0 for g in gradients(model).values())


def test_auxiliary_loss():
    model, (ids, labels) = tiny("mixtral aux loss"), batch()
    stock = model(input_ids=ids, labels=labels)
    stock.loss.backward()
    expected = gradients(model)
    out = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True, output_router_logits=True)
    torch.testing.assert_close(out.loss, stock.loss)
    torch.testing.assert_close(out.aux_loss, stock.aux_loss)
    out.loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_other_calls_stay_as_they_are():
    model, (ids, labels) = tiny(), batch()
    stock, logits = model(input_ids=ids, labels=labels).loss, model(input_ids=ids).logits
    generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    add_fused_lm_head(model)
    theirs = model.forward
    patch(model)
    for _ in range(2):  # before and after the first fused call
        torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, stock)
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=0)
        assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0), generated)
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert FusedHead.installed(model) is None
    unpatch(model)
    assert model.forward == theirs, "what the trainer installed is back"
    assert model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs is not None


def test_copies_run_their_own_weights():
    """TRL's forward is bound to the original: a copy of the model answers with the original's logits."""
    model, (ids, labels) = tiny(), batch()
    add_fused_lm_head(model)
    theirs = copy.deepcopy(model)
    patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    ours = copy.deepcopy(model)
    for clone in (theirs, ours):
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.zero_()
    assert theirs(input_ids=ids).logits.abs().max() > 0, "if this fails TRL has mended it: drop FusedHead.remove"
    assert ours(input_ids=ids).logits.abs().max() == 0
    out = ours(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs[out.label_mask], -torch.tensor(V).log().expand(int(out.label_mask.sum())))


@pytest.mark.parametrize("first", ["patch", "fused head", "fused head before the adapter"])
def test_adapters_on_the_head_count(first):
    """TRL multiplies by `lm_head.weight` and would leave the adapter out."""
    ids, labels = batch()
    plain = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))
    expected = dense(plain, ids, labels)
    expected["log_probs"].sum().backward()
    torch.manual_seed(0)
    base = tiny()
    if first == "fused head before the adapter":
        add_fused_lm_head(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))
    if first == "fused head":
        add_fused_lm_head(model.get_base_model())
    patch(model)
    if first == "patch":
        add_fused_lm_head(model.get_base_model())
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, expected["log_probs"], rtol=1e-4, atol=1e-5)
    stock = gradients(plain)
    out.log_probs.sum().backward()
    assert_same_gradients(gradients(model), stock, rtol=1e-4)
    assert any("lm_head.lora_A" in name for name in stock)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)


def test_prompt_learning():
    ids, labels = batch()
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), config)
    add_fused_lm_head(model.get_base_model())
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    ours = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert_equal(ours, {"log_probs": theirs.log_probs, "label_mask": theirs.label_mask, "loss": theirs.loss})


def test_dense_logits_are_scored_too():
    """An adapter that mixes the logits of several tokens makes them; the answer is the same."""
    ids, labels = batch()
    model = peft.get_peft_model(tiny(vocab_size=128), peft.RoadConfig(target_modules=["lm_head"], group_size=4))
    expected = dense(model, ids, labels)
    out = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert_equal(out, {k: v.detach() for k, v in expected.items()})
    assert patch_state(model).materialized > 0


def test_another_loss_under_trl_is_an_error():
    model, (ids, labels) = patch(tiny(), loss="focal"), batch()
    with pytest.raises(RuntimeError, match=r"patched with Focal.*no effect"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert model(input_ids=ids, labels=labels).loss > 0


def test_a_float32_head_is_left_to_trl():
    model, (ids, labels) = tiny(dtype=torch.bfloat16), batch()
    add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    patch(model)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert torch.equal(out.log_probs, expected) and patch_state(model).streamed == 0


def test_what_is_read_from_trls_forward():
    """If this fails, TRL's `add_fused_lm_head` has changed: its closure is what tells temperature and outputs."""
    model = tiny()
    assert FusedHead.installed(model) is None
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"), cast_lm_head_to_fp32=True)
    found = FusedHead.installed(model)
    assert (found.temperature, found.outputs, found.cast_lm_head_to_fp32) == (0.5, ("log_probs", "entropy"), True)
    assert {f.name for f in FusedCausalLMOutput.__dataclass_fields__.values()} == {
        "loss", "aux_loss", "label_mask", *STATISTICS,
    }  # fmt: skip


PROMPTS = ["the cat", "a dog", "one bird", "the fish"] * 2
ANSWERS = [" sat on a mat", " ran away", " sang a song", " swam in the sea"] * 2
OTHERS = [" stood", " slept all day", " was gone", " ate"] * 2


def table(kind):
    rows = {"prompt": PROMPTS}
    if kind in ("SFT", "KTO"):
        rows["completion"] = ANSWERS
    if kind == "KTO":
        rows["label"] = [True, False] * 4
    if kind == "DPO":
        rows |= {"chosen": ANSWERS, "rejected": OTHERS}
    return datasets.Dataset.from_dict(rows)


def longer(completions, **_):
    return [float(len(completion)) for completion in completions]


EXTRA = {
    "SFT": {},
    "SFT packed": {"packing": True, "max_length": 32},
    "SFT dft": {"loss_type": "dft"},
    "DPO": {"beta": 0.5},
    "DPO weighted": {"beta": 0.5, "use_weighting": True},
    "KTO": {"beta": 0.5},
    "GRPO": {"num_generations": 2, "max_completion_length": 6, "temperature": 0.9, "beta": 0.1},
}


def train(kind, model, folder, **options):
    name = kind.split()[0]
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    arguments = config_class(
        str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2, save_strategy="no", seed=0, bf16=False, **EXTRA[kind],
    )  # fmt: skip
    reward = {"reward_funcs": longer} if name == "GRPO" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=table(name),
            processing_class=tiny_tokenizer(),
            **reward,
            **options,
        )
        trainer.train()
    timing = ("time", "runtime", "per_second", "flos", "step_time")
    return [{k: v for k, v in e.items() if not any(t in k for t in timing)} for e in trainer.state.log_history], trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """TRL loads reference models from where the policy came from."""
    folder = tmp_path_factory.mktemp("model")
    tiny(std=0.05).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "by_callback"), [*((kind, False) for kind in EXTRA), ("SFT", True), ("DPO", True)])
def test_trainers_log_what_they_log_without_the_patch(kind, by_callback, saved, tmp_path):
    stock, _ = train(kind, AutoModelForCausalLM.from_pretrained(saved), tmp_path / "stock")
    model = AutoModelForCausalLM.from_pretrained(saved)
    if by_callback:
        ours, trainer = train(kind, model, tmp_path / "ours", callbacks=[hf_xent.PatchCallback()])
        assert "_hf_xent" not in model.__dict__
    else:
        ours, trainer = train(kind, patch(model), tmp_path / "ours")
    assert len(ours) == len(stock)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    if not by_callback:
        state = patch_state(trainer.model)
        assert state.streamed >= 3 and state.materialized == 0


def test_adalora_trains_as_without_the_callback(saved, tmp_path):
    """Its model calls the wrapped one's forward past its hooks, and adds a term to the loss."""
    logs = {}
    for callbacks in ([], [hf_xent.PatchCallback()]):
        config = peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        model = AutoModelForCausalLM.from_pretrained(saved)
        logs[bool(callbacks)], _ = train("SFT", model, tmp_path, peft_config=config, callbacks=callbacks)
    for ours, stock in zip(logs[True], logs[False], strict=True):
        assert ours == pytest.approx(stock, rel=2e-3, abs=2e-5)


def test_what_stood_under_trls_forward_comes_back():
    model, (ids, labels) = tiny(), batch()
    calls = []

    def mine(self, *args, **kwargs):
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    own = model.forward = MethodType(mine, model)
    add_fused_lm_head(model)
    patch(model)(input_ids=ids, labels=labels)
    assert calls and FusedHead.installed(model) is None and patch_state(model).streamed == 1
    unpatch(model)
    assert FusedHead.installed(model) is not None
    FusedHead.remove(model)
    assert model.forward == own


def test_training_with_an_adapter_on_the_head(tmp_path):
    """`model.add_adapter` puts it where TRL does not look: stock TRL leaves it untrained, ours trains it."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, lora_alpha=6)
    trained = {}
    for patched in (False, True):
        model = add_adapter(tiny(std=0.05), config)
        if patched:
            patch(model)
        train("SFT", model, tmp_path)
        trained[patched] = {n: p.detach().abs().max() for n, p in model.named_parameters() if "lm_head.lora_B" in n}
    assert all(value == 0 for value in trained[False].values()), "if this fails TRL trains adapters on the head now"
    assert trained[True] and all(value > 0 for value in trained[True].values())
