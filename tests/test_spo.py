"""SPO: the degree loss by hand, the trainers below it untouched, and a head that travels beside the model."""

import copy
import pickle
import warnings
from dataclasses import dataclass

import datasets
import peft
import pytest
import torch
import trl
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_xent.patching import patch_state
from hf_xent.trainers import SPO, SPCEConfig, SPCETrainer, SPOConfig, SPOOptions, SPOTrainer
from hf_xent.trainers.variants import Variants
from support.models import assert_same_gradients, gradients, tiny, tiny_tokenizer
from support.preferences import CHOSEN, LORA, PROMPTS, fit, logged, table, trainer_of

if Version(trl.__version__) < Version("1.16"):
    pytest.skip("log-probabilities without logits need TRL's fused head, on CPUs from 1.16 on", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # TRL's: experimental trainers say so, and more
]
SPO_DPO = (SPOTrainer, SPOConfig)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny(std=0.05).save_pretrained(folder)
    return folder


@dataclass
class SPOKTOConfig(SPOOptions, trl.KTOConfig):
    pass


class SPOKTOTrainer(SPO, trl.KTOTrainer):
    pass


@dataclass
class SoftConfig(SPOOptions, SPCEConfig):
    pass


class SoftTrainer(SPO, SPCETrainer):
    pass


def test_variants_by_hand():
    """Which tokens, where the answer begins, which degree, side and weight; the end token stays."""
    tokenizer = tiny_tokenizer()
    options = SPOOptions(degrees=2, max_removed=1.0, gamma_w=0.5, gamma_l=0.25)
    collate = Variants(lambda rows: {"inner": len(rows)}, tokenizer, options)
    row = {"prompt": "the dog", "chosen": " ran to the fox</s>", "rejected": " quick fox</s>"}
    batch = collate([row, row])
    assert batch["inner"] == 2
    task = batch["spo"]
    texts = [
        tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(task["input_ids"], task["attention_mask"], strict=True)
    ]
    expected = ["the dog ran to the fox</s>", "the dog to the </s>", "the dog quick fox</s>", "the dog </s>"]
    assert [text.lstrip() for text in texts] == expected * 2  # the tokenizer's own space
    assert task["degree"].tolist() == [0, 1] * 4 and task["side"].tolist() == [0, 0, 1, 1] * 2
    assert task["weight"].tolist() == [0.125, 0.125, 0.0625, 0.0625] * 2  # over 2 rows and 2 degrees
    answers = [tokenizer.decode(ids[where]) for ids, where in zip(task["input_ids"], task["answer"], strict=True)]
    assert answers == [text.lstrip().removeprefix("the dog") for text in texts]
    one_sided = Variants(dict, tokenizer, SPOOptions(gamma_w=0.0, gamma_l=0.0))
    assert one_sided([]) == {} and Variants(dict, tokenizer, SPOOptions(gamma_l=0.0)).options.shares == [0, 0.375, 0.75]


def test_variants_of_conversations_and_completions():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} jumps {% endfor %}"
    collate = Variants(lambda rows: {}, tokenizer, SPOOptions(degrees=2, max_removed=1.0))
    row = {"prompt": [{"role": "user", "content": "dog"}], "label": False}
    task = collate([row | {"completion": [{"role": "assistant", "content": "fox of the dog"}]}])["spo"]
    texts = [tokenizer.decode(ids[where]) for ids, where in zip(task["input_ids"], task["answer"], strict=True)]
    assert [text.strip() for text in texts] == ["fox of the dog jumps", "of the  jumps"]
    assert task["side"].tolist() == [1, 1], "an undesirable completion counts as rejected"


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TEMPLATE = "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def told(text):
    return [{"type": "text", "text": text}, {"type": "image", "text": None}]


def test_variants_of_tool_calls_and_of_content_in_parts():
    """Text is cut wherever it stands; what is none stays, and an answer without text has no variants."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    collate = Variants(lambda rows: {}, tokenizer, SPOOptions(degrees=2, max_removed=1.0, gamma_l=0.0))
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answers = {
        "a call and an answer": [call, {"role": "assistant", "content": "fox of the dog", "tool_calls": None}],
        "parts": [{"role": "assistant", "content": told("fox of the dog")}],
    }
    for answer in answers.values():
        whole, cut = collate._cut(answer)
        assert whole == answer
        text = cut[-1]["content"] if isinstance(cut[-1]["content"], str) else cut[-1]["content"][0]["text"]
        assert text == "of the " and cut[:-1] == answer[:-1]
        assert isinstance(cut[-1]["content"], str) or cut[-1]["content"][1:] == told("")[1:]
    row = {"prompt": [{"role": "user", "content": "the dog "}], "rejected": []}
    assert collate([row | {"chosen": [call]}]) == {} == collate([row | {"chosen": [{"content": told(" ")}]}])
    tools = {"chosen": answers["a call and an answer"][1:], "tools": '[{"name": "fox"}]'}
    [first, _] = collate([row | tools])["spo"]["input_ids"]
    assert tokenizer.decode(first).strip().startswith("fox the dog fox of"), "the prompt is what TRL makes of it"


@pytest.mark.parametrize("kind", ["tools", "parts"])
def test_trains_on_tool_calls_and_content_in_parts(saved, tmp_path, kind):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    done = {"role": "assistant", "content": "the lazy dog", "tool_calls": None}
    chosen, rejected, prompt = [call, done], [done], "the fox"
    if kind == "parts":
        part = lambda text: [{"type": "text", "text": text}]  # noqa: E731
        chosen, rejected, prompt = ([{"role": "assistant", "content": part(x)}] for x in ("a fox", "dog", "the fox"))
        prompt = prompt[0]["content"]
    row = {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    args = SPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, logging_steps=1, save_strategy="no")
    trainer = SPOTrainer(
        tiny(std=0.05), tiny(std=0.05), args, train_dataset=datasets.Dataset.from_list([row] * 2),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "degree_loss") == [[pytest.approx(torch.tensor(3.0).log().item(), abs=1e-5)]]


def test_every_evaluation_has_its_own_names(saved, tmp_path):
    """TRL's means too, which it calls eval_ whatever is evaluated."""
    trainer = trainer_of(*SPO_DPO, tmp_path, saved)
    sets = {"a": table(), "b": table().select(range(3))}
    found = trainer.evaluate(sets)
    names = ("degree_loss", "degree_accuracy", "rewards/chosen", "logps/chosen", "loss")
    assert {f"eval_{part}_{name}" for part in sets for name in names} <= found.keys()
    assert not any(f"eval_{name}" in found for name in names)
    alone = trainer.evaluate(sets["a"])
    assert found["eval_a_logps/chosen"] == pytest.approx(alone["eval_logps/chosen"])
    trainer.predict(trainer._prepare_dataset(sets["b"], trainer.processing_class, trainer.args, "eval"))
    assert trainer.evaluate(sets["a"])["eval_logps/chosen"] == alone["eval_logps/chosen"], "predict leaves nothing"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracer reads it
def test_a_compiled_policy_trains_as_it_does_without(saved, tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled, plain = (fit(*SPO_DPO, tmp_path, saved, **more) for more in (options, {}))
    for name in ("loss", "degree_loss"):
        torch.testing.assert_close(logged(compiled, name), logged(plain, name), rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_what_spo_cannot_do_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"args is a DPOConfig: SPOTrainer takes a hf_xent\.SPOConfig"):
        trainer_of(SPOTrainer, trl.DPOConfig, tmp_path, saved)
    with pytest.raises(ValueError, match=r"args is a SPCEConfig: SoftTrainer takes a hf_xent\.SPOOptions"):
        trainer_of(SoftTrainer, SPCEConfig, tmp_path, saved)
    with pytest.raises(ValueError, match="args is None: SPOKTOTrainer takes a configuration whose class derives"):
        SPOKTOTrainer(tiny(), train_dataset=table())


def test_the_collator_pickles(saved, tmp_path):
    trainer = trainer_of(*SPO_DPO, tmp_path, saved)
    rows = [trainer.train_dataset[i] for i in range(2)]
    found, expected = pickle.loads(pickle.dumps(trainer.data_collator))(rows), trainer.data_collator(rows)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert all(torch.equal(found["spo"][name], x) for name, x in expected["spo"].items())


def dense_degrees(trainer, model, task, kind, pooling, two):
    """The degree loss from an unpatched model's hidden states, by the docstring's formulas."""
    hidden = model(input_ids=task["input_ids"], attention_mask=task["attention_mask"], output_hidden_states=True)
    total = 0
    for i, h in enumerate(hidden.hidden_states[-1]):
        rows = h[task["answer"][i]]
        pooled = rows[-1] if pooling == "last" else rows.mean(0)
        side = int(task["side"][i]) if two else 0
        z = trainer.degree_head.weight.detach()[side] @ pooled + trainer.degree_head.bias.detach()[side]
        j = int(task["degree"][i])
        if kind == "classes":
            loss = -z.log_softmax(0)[j]
        else:
            terms = [-(z[k].sigmoid() if j >= k + 1 else 1 - z[k].sigmoid()).log() for k in range(len(z))]
            loss = sum(terms) / len(terms)
        gamma = (0.7, 0.3)[int(task["side"][i])]
        total = total + gamma * loss / 3 / 4
    return total


@pytest.mark.parametrize(
    ("kind", "pooling", "two"), [("classes", "last", False), ("ordinal", "mean", True), ("ordinal", "last", False)]
)
def test_the_degree_loss_and_its_gradients_are_those_of_the_formula(kind, pooling, two, saved, tmp_path):
    options = {"degree_head": kind, "pooling": pooling, "two_heads": two, "gamma_w": 0.7, "gamma_l": 0.3}
    trainer = trainer_of(*SPO_DPO, tmp_path, saved, **options)
    plain = trainer_of(*SPO_DPO, tmp_path, saved, gamma_w=0.0, gamma_l=0.0)
    with torch.no_grad():
        for parameter in trainer.degree_head.parameters():
            parameter.normal_(std=0.5)
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    mine = {k: g for k, g in gradients(trainer.model).items() if "degree_head" not in k}

    base = plain.compute_loss(plain.model, {k: x for k, x in inputs.items() if k != "spo"})
    base.backward()
    stock, model = gradients(plain.model), AutoModelForCausalLM.from_pretrained(saved)
    expected = dense_degrees(trainer, model, inputs["spo"], kind, pooling, two)
    expected.backward()
    torch.testing.assert_close(loss, base + expected, rtol=1e-5, atol=1e-6)
    dense = gradients(model)
    added = {name: g + dense.get(name, 0) for name, g in stock.items() if "degree_head" not in name}
    assert_same_gradients(mine, added, rtol=1e-4)
    assert patch_state(trainer.model).materialized == 0


KINDS = {
    "DPO": (SPOTrainer, SPOConfig, trl.DPOTrainer, trl.DPOConfig, {}),
    "IPO": (SPOTrainer, SPOConfig, trl.DPOTrainer, trl.DPOConfig, {"loss_type": "ipo"}),
    "mixture": (SPOTrainer, SPOConfig, trl.DPOTrainer, trl.DPOConfig, {"loss_type": ["hinge", "sft"]}),
    "KTO": (SPOKTOTrainer, SPOKTOConfig, trl.KTOTrainer, trl.KTOConfig, {}),
    "SPCE": (SoftTrainer, SoftConfig, SPCETrainer, SPCEConfig, {}),
}


def rows_of(name):
    if name == "SPCE":
        return table(preference_prob=[0.7] * 8)
    if name != "KTO":
        return table()
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * 4})


@pytest.mark.parametrize("name", KINDS)
def test_gamma_of_zero_is_the_trainer_below(name, saved, tmp_path):
    ours, config, base, base_config, options = KINDS[name]
    with_nothing = fit(ours, config, tmp_path, saved, rows_of(name), gamma_w=0.0, gamma_l=0.0, **options)
    stock = fit(base, base_config, tmp_path, saved, rows_of(name), **options)
    for mine, theirs in zip(logged(with_nothing), logged(stock), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    added = fit(ours, config, tmp_path, saved, rows_of(name), gamma_w=0.5, gamma_l=0.5, **options)
    halves = 0.5 if name == "KTO" else 1.0  # a completion has one side, a pair has two
    ln3 = torch.tensor(3.0).log().item()
    assert logged(added)[0][0] == pytest.approx(logged(stock)[0][0] + halves * ln3, rel=1e-5)
    assert logged(added, "degree_loss")[0] == pytest.approx([ln3], rel=1e-5), "a head of zeros knows nothing"
    assert logged(added, "degree_loss")[-1][0] < ln3


def test_orpo_takes_it_too(saved, tmp_path):
    """An experimental trainer of TRL: full logits, no reference, another collator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    @dataclass
    class Config(SPOOptions, ORPOConfig):
        pass

    class Trainer(SPO, ORPOTrainer):
        pass

    found = fit(Trainer, Config, tmp_path, saved, gamma_w=0.5, gamma_l=0.5)
    plain = fit(ORPOTrainer, ORPOConfig, tmp_path, saved)
    ln3 = torch.tensor(3.0).log().item()
    assert logged(found)[0][0] == pytest.approx(logged(plain)[0][0] + ln3, rel=1e-5)
    assert logged(found, "degree_loss")[-1][0] < ln3


SETTINGS = {
    "full": {},
    "adapter": {"peft_config": peft.LoraConfig(**LORA)},
    "precomputed reference": {"precompute_ref_log_probs": True, "two_heads": True},
    "checkpointing": {"gradient_checkpointing": True, "degree_head": "ordinal"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_head_travels_beside_the_model(setting, saved, tmp_path):
    """Resumed losses are those of a straight run; the head is in its own file, and nowhere else."""
    options = {**SETTINGS[setting], "save_strategy": "steps", "save_steps": 2, "gamma_w": 1.0}
    straight = fit(*SPO_DPO, tmp_path, saved, **options)
    head = copy.deepcopy(straight.degree_head.state_dict())
    resumed = fit(*SPO_DPO, tmp_path, saved, resume=str(tmp_path / "checkpoint-2"), **options)
    assert logged(resumed, "loss", "degree_loss") == logged(straight, "loss", "degree_loss")
    assert all(torch.equal(x, head[name]) for name, x in resumed.degree_head.state_dict().items())
    assert max(x.abs().max() for x in head.values()) > 0
    folder = tmp_path / "checkpoint-4"
    kept = load_file(folder / "_degree_head.safetensors")
    assert all(torch.equal(x, head[name]) for name, x in kept.items()) and kept.keys() == head.keys()
    straight.model.save_pretrained(tmp_path / "by hand")
    for place in (folder, tmp_path / "by hand"):
        [file] = place.glob("*model.safetensors")
        with safe_open(file, "pt") as tensors:
            assert not [name for name in tensors.keys() if "degree_head" in name]  # noqa: SIM118  no mapping
    if setting == "full":  # no unexpected keys for whoever loads it
        loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[1]
        assert not loaded["unexpected_keys"] and not loaded["missing_keys"]


def test_the_head_is_pushed_only_if_asked(saved, tmp_path):
    """`Trainer.push_to_hub` leaves out names that begin with an underscore."""
    import inspect

    from transformers import Trainer

    assert '"_*"' in inspect.getsource(Trainer.push_to_hub)
    for push, name in ((False, "_degree_head.safetensors"), (True, "degree_head.safetensors")):
        trainer = trainer_of(*SPO_DPO, tmp_path / str(push), saved, push_degree_head=push)
        trainer.save_model()
        assert [file.name for file in (tmp_path / str(push)).glob("*degree_head*")] == [name]
    (tmp_path / "True" / "degree_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no degree_head.safetensors"):
        trainer._load_from_checkpoint(str(tmp_path / "True"))


def test_degrees_are_learned(saved, tmp_path):
    trainer = fit(
        *SPO_DPO, tmp_path, saved, gamma_w=5.0, gamma_l=5.0, max_steps=25, per_device_train_batch_size=8, degrees=2
    )
    found = logged(trainer, "degree_accuracy", "degree_loss")
    assert found[0][0] == 0.5 and found[-1][0] > 0.75 and found[-1][1] < 0.5
    again = trainer.evaluate(table())
    assert again["eval_degree_accuracy"] == pytest.approx(found[-1][0], abs=0.15)


def test_accumulation_does_not_change_gradients(saved, tmp_path):
    found = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(*SPO_DPO, tmp_path, saved, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        with torch.no_grad():
            trainer.degree_head.weight.copy_(torch.linspace(-1, 1, trainer.degree_head.weight.numel()).view(1, 3, -1))
        trainer.train()
        found += logged(trainer)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_refusals():
    for options, match in (
        ({"key_content": "tfidf"}, r"key_content is 'tfidf': choose 'rake' or 'random'"),
        ({"degree_head": "coral"}, r"degree_head is 'coral'"),
        ({"pooling": "max"}, r"pooling is 'max'"),
        ({"degrees": 1}, r"degrees is 1"),
        ({"max_removed": 0.0}, r"max_removed is 0.0"),
        ({"gamma_l": -1.0}, r"gamma_l is -1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            SPOConfig("out", use_cpu=True, **options)
    assert F.cross_entropy(torch.zeros(1, 3), torch.tensor([2])) == pytest.approx(1.0986, abs=1e-4)
