"""OSP: what a round makes, whose judgment it is, and that rounds resume, repeat and accumulate as one run does."""

import datasets
import peft
import pytest
import torch

from hf_xent.data import Format
from hf_xent.generation.judging import ModelJudge, both_orders, strength
from hf_xent.generation.sampling import responses
from hf_xent.patching import patch_state
from hf_xent.trainers import OSPConfig, OSPTrainer, SPCEConfig, SPCETrainer
from support.models import tiny, tiny_tokenizer
from support.ranks import run_ranks

# TRL's configuration sets the old name of the option
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("without_progress_bars"),
]
TEXT = "the quick brown fox jumps over the lazy dog or is a b " * 8
PROMPTS = ["the quick", "a lazy brown", "the", "fox jumps over"]
FORMAT = Format("{prompt} over {first} or {second} is", ("a", "b"))
COMMON = {
    "num_generations": 3, "max_new_tokens": 5, "generation_batch_size": 5, "num_train_epochs": 2, "seed": 3,
    "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
    "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "beta": 0.5,
    "gradient_checkpointing": False,
}  # fmt: skip


def prompts(**columns):
    return datasets.Dataset.from_dict({"prompt": PROMPTS, **columns})


def trainer_of(folder, rows=None, *, adapter=False, by=None, generate=responses, **options):
    """Full fine-tuning or LoRA, the policy as its judge or `by` another one."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if adapter else None
    return OSPTrainer(
        tiny(), None if adapter else tiny(), OSPConfig(output_dir=str(folder), **{**COMMON, **options}),
        processing_class=tiny_tokenizer(TEXT), train_dataset=prompts() if rows is None else rows, peft_config=lora,
        judge=ModelJudge(format=FORMAT) if by is None else by, generate=generate,
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(folder, *args, resume=None, **options):
    trainer = trainer_of(folder, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def longer(rows, first, second):
    """A program as a judge: more letters are better."""
    return [0.5 + (len(a) > len(b)) / 2 - (len(b) > len(a)) / 2 for a, b in zip(first, second, strict=True)]


def test_a_round_by_hand(tmp_path):
    """Scores, ranks and strengths of saved pairs, from an untouched model; the tokens trained on are those sampled."""
    rows = prompts(baseline=["fox", "the dog", "is", "a b"], note=["w", "x", "y", "z"])
    trainer = run(tmp_path, rows, baseline="given", pairs="all", num_train_epochs=1)
    made = trainer.pairs(0)
    assert len(made) == 4 * 3 and list(made["note"][::3]) == ["w", "x", "y", "z"] and set(made["round"]) == {0}
    tokenizer = trainer.processing_class
    judge = ModelJudge(tiny(), tokenizer, FORMAT)
    for side in ("chosen", "rejected"):
        assert list(made[side]) == tokenizer.batch_decode(list(made[f"{side}_ids"]), skip_special_tokens=True)
        expected = both_orders(judge, list(made), made[side], made["baseline"]).p
        torch.testing.assert_close(
            torch.tensor(made[f"{side}_score"], dtype=torch.float64), expected, rtol=0, atol=1e-6
        )
    for row in made:
        assert row["chosen_score"] >= row["rejected_score"]
        assert row["preference_prob"] == pytest.approx(strength(row["chosen_score"], row["rejected_score"]))
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
    assert len({row["preference_prob"] for row in made}) > 6
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are still the same
    history = trainer.state.log_history[0]
    assert history["judge/strength"] == pytest.approx(sum(made["preference_prob"]) / 12)
    assert 1 <= history["answers/tokens"] <= 5 and 0 <= history["judge/steady"] <= 1


def test_a_round_is_an_epoch_of_spce(tmp_path):
    """SPCETrainer on the saved texts, with the same seed, takes the same steps."""

    def generate(model, prompts, *, tokens, seed, temperature):
        tokenizer = tiny_tokenizer(TEXT)
        words = [" dog", " lazy dog", " over the fox"]
        return [tokenizer(words[(seed + i) % 3])["input_ids"] + [2] for i in range(len(prompts))]

    osp = run(tmp_path / "osp", num_train_epochs=1, pairs="all", generate=generate)
    pairs = osp.pairs(0).select_columns(["prompt", "chosen", "rejected", "preference_prob"])
    known = set(OSPConfig.__dataclass_fields__) - set(SPCEConfig.__dataclass_fields__)
    options = {name: value for name, value in COMMON.items() if name not in known} | {"num_train_epochs": 1}
    config = SPCEConfig(output_dir=str(tmp_path / "spce"), **options)
    spce = SPCETrainer(tiny(), tiny(), config, train_dataset=pairs, processing_class=tiny_tokenizer(TEXT))
    spce.train()
    assert losses(osp) == pytest.approx(losses(spce), abs=1e-6) and len(losses(osp)) == 6


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "peft"])
def test_whose_judgment_it_is(tmp_path, adapter):
    """In round 1 the policy has moved: its own judgment has too, the reference's is the untouched model's."""
    rows = prompts(baseline=["fox", "the dog", "is", "a b"])
    options = {"baseline": "given", "adapter": adapter, "learning_rate": 0.1}
    judge = ModelJudge(tiny(), tiny_tokenizer(TEXT), FORMAT)
    gaps = {}
    for whose in ("reference", "policy"):
        trainer = run(tmp_path / whose, rows, judge=whose, **options)
        made = trainer.pairs(1)
        expected = both_orders(judge, list(made), made["chosen"], made["baseline"]).p
        gaps[whose] = (torch.tensor(made["chosen_score"], dtype=torch.float64) - expected).abs().max()
        assert patch_state(trainer.model).materialized == 0
    assert gaps["reference"] < 1e-6 < 1e-3 < gaps["policy"]


@pytest.mark.parametrize(("stop", "options"), [
    (1, {}), (2, {}), (3, {"adapter": True}), (3, {"round_epochs": 2, "num_train_epochs": 4}),
], ids=["within", "between", "peft", "epochs"])  # fmt: skip
def test_resumed_is_uninterrupted(tmp_path, stop, options):
    """Two steps an epoch, stopped before the end and resumed by a trainer that has just been made."""
    whole = run(tmp_path / "whole", **options)
    saving = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path / "part", max_steps=stop, **saving, **options)
    rest = run(tmp_path / "part", resume=str(tmp_path / "part" / f"checkpoint-{stop}"), **saving, **options)
    assert losses(rest) == losses(whole) and len(set(losses(whole))) > 2
    last = int(options.get("num_train_epochs", 2)) // options.get("round_epochs", 1) - 1
    assert rest.pairs(last)[:] == whole.pairs(last)[:]


def test_pairs_are_read_again_within_a_round_and_missed_if_gone(tmp_path):
    calls = []

    def generate(model, prompts, *, tokens, seed, temperature):
        calls.append(seed)
        return [[5 + (seed + i) % 7, 2] for i in range(len(prompts))]

    options = {"generate": generate, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    run(tmp_path, max_steps=1, **options)
    made = len(calls)
    assert made == 3 and len(set(calls)) == 3  # 12 answers, 5 at a time, a seed each
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)
    assert len(calls) == made and resumed.state.global_step == 2
    (tmp_path / "_pairs").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no pairs of round 0 in .*: start the run from its beginning"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)


def test_seeds(tmp_path):
    one, again, other = (run(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    assert losses(one) == losses(again) and one.pairs(1)[:] == again.pairs(1)[:]
    assert one.pairs(0)["chosen_ids"] != other.pairs(0)["chosen_ids"]
    assert one.pairs(0)["chosen_ids"] != one.pairs(1)["chosen_ids"]


def test_accumulation_is_invariant(tmp_path):
    whole = run(tmp_path / "whole", per_device_train_batch_size=4)
    parts = run(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5) and len(losses(whole)) == 2
    norms = [[entry["grad_norm"] for entry in x.state.log_history if "grad_norm" in entry] for x in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def on_a_rank(rank, folder):
    calls = []

    def generate(*args, **options):
        calls.append(rank)
        return responses(*args, **options)

    trainer = run(folder, generate=generate, ddp_backend="gloo")
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return len(calls), losses(trainer), weights, type(trainer.model_wrapped).__name__


@pytest.mark.slow  # two processes start
def test_two_ranks_share_the_pairs_of_one(tmp_path):
    """The main process samples, both train on its pairs: as one process with batches of twice the size."""
    single = run(tmp_path / "single", per_device_train_batch_size=4)
    (made, found, weights, kind), (idle, _, others, _) = run_ranks(2, on_a_rank, tmp_path, tmp_path / "both")
    assert kind == "DistributedDataParallel" and (made, idle) == (6, 0)
    assert found == pytest.approx(losses(single), abs=1e-5) and torch.equal(weights, others)


def test_a_program_judges_with_one_comparison_an_answer(tmp_path):
    asked = []

    def judge(rows, first, second):
        asked.append(len(rows))
        assert all(row["note"] == "n" for row in rows)
        return longer(rows, first, second)

    rows = prompts(note=["n"] * 4)
    trainer = run(tmp_path / "sample", rows, by=judge, num_train_epochs=1, num_generations=4, max_new_tokens=9)
    assert asked == [4 * 3, 4 * 3], "both orders, none for the baseline itself"
    for row in trainer.pairs(0):
        assert len(row["chosen"]) >= len(row["rejected"])
        assert row["preference_prob"] == 0.5 or row["preference_prob"] >= strength(0.5, 0.0)
    asked.clear()
    run(tmp_path / "greedy", rows, by=judge, num_train_epochs=1, num_generations=4, baseline="greedy")
    assert asked == [4 * 4, 4 * 4]


def test_equal_answers_teach_nothing(tmp_path):
    same = lambda model, prompts, **_: [[7, 8, 2]] * len(prompts)  # noqa: E731
    trainer = run(tmp_path, generate=same, by=lambda rows, *_: [0.9] * len(rows), num_train_epochs=1)
    assert set(trainer.pairs(0)["preference_prob"]) == {0.5}
    assert losses(trainer) == pytest.approx([0.693147] * 2, abs=1e-6)
    assert max(entry.get("grad_norm", 0) for entry in trainer.state.log_history) < 1e-6
    assert "judge/steady" not in trainer.state.log_history[0], "nothing to compare"


def test_chats_and_evaluation(tmp_path):
    """Messages in, messages out, the generation prompt before the answer; evaluation on pairs as SPCE does it."""
    tokenizer = tiny_tokenizer(TEXT)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}</s>{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} a{% endif %}"
    )
    rows = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    config = OSPConfig(output_dir=str(tmp_path), **{**COMMON, "num_train_epochs": 1})
    held_out = datasets.Dataset.from_dict({"prompt": ["the"], "chosen": [" dog"], "rejected": [" fox"]})
    trainer = OSPTrainer(
        tiny(), tiny(), config, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, judge=longer
    )
    trainer.train()
    row = trainer.pairs(0)[0]
    assert row["chosen"][0]["role"] == "assistant" and row["prompt"] == rows[0]["prompt"]
    text = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert row["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 0 < trainer.evaluate()["eval_loss"] < 5


@pytest.mark.parametrize(("options", "message"), [
    ({"judge": "me"}, "judge is 'me': choose 'policy' or 'reference'"),
    ({"pairs": "some"}, "pairs is 'some': choose 'best_worst', 'adjacent' or 'all'"),
    ({"num_generations": 1}, r"num_generations is 1: choose a whole number in \[2, inf\)"),
    ({"strength_eps": 0.5}, "strength_eps is 0.5"),
    ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs is True, but the pairs are made during training"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length', but the pairs"),
    ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers is True"),
])  # fmt: skip
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        OSPConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_data_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="with the columns prompt, baseline"):
        trainer_of(tmp_path, baseline="given")
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, with max_new_tokens 5 more than max_length 6"):
        trainer_of(tmp_path, max_length=6)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    for content in (call, {"role": "user", "content": [{"type": "text", "text": "the dog"}]}):
        with pytest.raises(ValueError, match=r"a message of a prompt has content of type (NoneType|list)"):
            trainer_of(tmp_path, datasets.Dataset.from_dict({"prompt": [[content]]}))
