"""What Mirostat takes and refuses: every option of `generate`, and what the processor itself can see go wrong."""

import re
import warnings

import pytest
import torch
from transformers import GenerationConfig

from hf_xent.generation.decoding import BEFORE, LENGTH, NEUTRAL, RUNNING
from hf_xent.generation.mirostat import Mirostat, generate
from support.models import V, batch, tiny, tiny_tokenizer

PLAIN = {"do_sample": True, "top_k": 0, "top_p": 1.0}
ENDLESS = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}
DRAWING = {  # options that draw, rank or propose tokens, or serve one that does: an example of each is refused
    "top_h": 0.4, "early_stopping": True, "length_penalty": 2.0, "use_mtp": True, "watermarking_config": {"bias": 2.0},
    "is_assistant": True, "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.3, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2,
    "assistant_early_exit": 1, "assistant_lookbehind": 5, "target_lookbehind": 5, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "continuous_batching_config": {"max_memory_percent": 0.5}, "low_memory": True,
    "penalty_alpha": 0.6, "dola_layers": "low", "diversity_penalty": 0.5, "num_beam_groups": 2, "constraints": [1],
    "force_words_ids": [[3]],
}  # fmt: skip
KEPT = {  # an example of every option that is left as it is; None: see the test
    "max_length": 17, "max_new_tokens": 5, "min_length": 9, "min_new_tokens": 3, "max_time": 100.0,
    "stop_strings": None, "use_cache": False, "cache_implementation": "static", "cache_config": {}, "max_cache_len": 40,
    "prefill_chunk_size": 3, "compile_config": None, "disable_compile": True, "pad_token_id": 3, "bos_token_id": 5,
    "eos_token_id": [7, 8], "decoder_start_token_id": 4, "num_return_sequences": 2, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "repetition_penalty": 1.3, "encoder_repetition_penalty": None, "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": None, "bad_words_ids": [[5], [6, 7]], "forced_bos_token_id": 9,
    "forced_eos_token_id": 11, "remove_invalid_values": True, "suppress_tokens": [3, 4], "begin_suppress_tokens": [5],
    "sequence_bias": [[[7], -5.0]], "guidance_scale": 1.5, "exponential_decay_length_penalty": (2, 1.1),
    "renormalize_logits": True, "token_healing": None,
}  # fmt: skip


def test_every_option_of_generate_is_in_one_group():
    """An option that a later transformers adds is refused until it is put into a group; this test names it."""
    groups = [set(LENGTH), set(RUNNING), set(BEFORE), set(NEUTRAL), set(DRAWING), {"transformers_version"}]
    known = [name for group in groups for name in group]
    assert len(known) == len(set(known))
    unknown = {name for name in vars(GenerationConfig()) if name[0] != "_"} - set(known)
    assert not unknown, f"options of generate in no group: {sorted(unknown)}"
    assert set(KEPT) == set(LENGTH) | set(RUNNING) | set(BEFORE)


@pytest.mark.parametrize("name", DRAWING)
def test_options_that_draw_are_refused(name):
    if name not in vars(GenerationConfig()):
        pytest.skip("this transformers has no such option")
    with pytest.raises(ValueError, match=f"{name} is given, but Mirostat alone"):
        generate(tiny(), batch()[0], **ENDLESS, **{name: DRAWING[name]})


@pytest.fixture(scope="module")
def model():
    return tiny(std=0.3)


class Seen(Mirostat):
    """Mirostat that keeps the scores it was given."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        made.append(self)
        self.given = []

    def __call__(self, input_ids, scores):
        self.given.append(scores.clone())
        return super().__call__(input_ids, scores)


made: list[Seen] = []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, value in KEPT.items() if value is not None])
def test_options_that_are_left_as_they_are_leave_mirostat_exact(model, name, monkeypatch):
    """Every token but the last is observed once, with its surprise under the scores before Mirostat."""
    monkeypatch.setattr("hf_xent.generation.mirostat.Mirostat", Seen)
    ids = batch()[0]
    options = (
        ENDLESS | {"eos_token_id": 2} | ({"max_new_tokens": None} if name == "max_length" else {}) | {name: KEPT[name]}
    )
    torch.manual_seed(0)
    found = generate(model, ids, target=2.5, **options)
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    mirostat, new = made[-1], sequences[:, ids.shape[1] :]
    assert len(mirostat.given) == new.shape[1] and len(mirostat.observed) == new.shape[1] - 1
    expected = torch.stack([s.log_softmax(-1) for s in mirostat.given], 1).gather(-1, new[..., None])[..., 0]
    observed = torch.stack(mirostat.observed, 1)
    alive = ~observed.isnan()
    assert alive.any()
    torch.testing.assert_close(observed[alive], (-expected / torch.tensor(2.0).log())[:, :-1][alive])
    torch.testing.assert_close(mirostat.mu, 5 - (observed.nan_to_num(2.5) - 2.5).sum(-1))


def test_stop_strings_end_a_row_and_its_padding_is_no_surprise(model):
    tokenizer = tiny_tokenizer("the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. ")
    model = tiny(std=0.1, vocab_size=len(tokenizer))
    ids = torch.randint(3, len(tokenizer), (6, 4), generator=torch.Generator().manual_seed(0))
    mirostat = Mirostat(2.0)
    options = PLAIN | {"max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": 1, "stop_strings": [" "]}
    torch.manual_seed(1)
    found = model.generate(ids, logits_processor=[mirostat], tokenizer=tokenizer, **options)
    observed = torch.stack(mirostat.observed, 1)
    padded = found[:, ids.shape[1] : -1] == 0
    assert padded.any() and (observed.isnan() <= padded).all() and observed[~padded].isfinite().all()


def test_the_processor_refuses_beams(model):
    for more in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        with pytest.raises(ValueError, match=r"reordered, as beams are|ruled out was taken"):
            model.generate(batch()[0], num_beams=4, logits_processor=[Mirostat(3.0)], **(ENDLESS | more))


def test_the_processor_refuses_assisted_decoding_without_being_told(model):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    told = {"the sequences go back": "their first .* assisted=True", "a proposal": "ruled out .* assisted=True"}
    found = set()
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("qwen3", std=0.3)}):
        for seed in range(3):
            torch.manual_seed(seed)
            with pytest.raises(ValueError, match="assisted=True") as error:
                model.generate(ids, logits_processor=[Mirostat(4.0)], **(ENDLESS | PLAIN), **more)
            found |= {how for how, text in told.items() if re.search(text, str(error.value))}
    assert found == set(told)


def test_the_processor_refuses_sequences_that_it_did_not_sample():
    ids, scores = torch.tensor([[3, 4], [3, 5]]), torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log().expand(2, -1)

    def started(**options):
        mirostat = Mirostat(1.0, **options)
        kept = mirostat(ids, scores)
        assert kept.isfinite().tolist() == [[True, True, False, False]] * 2  # mu is 2 bits
        return mirostat

    def after(*tokens):
        return torch.cat([ids, torch.tensor(tokens)], 1)

    with pytest.raises(ValueError, match="2 tokens came at once"):
        started()(after([0, 0], [0, 0]), scores)
    with pytest.raises(ValueError, match="reordered"):
        started()(after([0], [0]).flip(0), scores)
    with pytest.raises(ValueError, match="reordered"):
        started()(after([0], [0])[:1], scores)
    with pytest.raises(ValueError, match="ruled out was taken"):
        started()(after([2], [3]), scores)
    one = started()
    one(after([2], [1]), scores)  # padding after a stop string, as far as anybody can tell
    assert one.observed[0].isnan().tolist() == [True, False]
    one(after([2], [1]) + 1, scores)  # other sequences: a new call
    assert not one.observed and one.mu.tolist() == [2, 2]


def test_truncation_after_mirostat_is_noticed():
    model, ids = tiny(std=0.05), batch(rows=16)[0]  # flat: log2 97 bits
    options = ENDLESS | {"max_new_tokens": 20}
    for more, count in (({"do_sample": True}, 50), ({"do_sample": False}, 1)):
        with pytest.warns(UserWarning, match=f"every token was among the {count} likeliest") as told:
            model.generate(ids, logits_processor=[Mirostat(6.0)], **options, **more)
        assert len(told) == 1
    for target in (0.5, 6.0):  # where Mirostat itself leaves few tokens, or takes all, nothing is noticed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(ids, logits_processor=[Mirostat(target)], **options, **PLAIN)
    assert V > 50


def test_assistance_is_asked_for(model):
    ids = batch(rows=1)[0]
    for name, value in {"assistant_model": model, "prompt_lookup_num_tokens": 3}.items():
        with pytest.raises(ValueError, match=f"{name} is given, .* or add assisted=True"):
            generate(model, ids, **{name: value})
    with pytest.raises(ValueError, match="assisted is True, but nothing assists"):
        generate(model, ids, assisted=True)
    with pytest.raises(ValueError, match="assisted is 1: choose True or False"):
        generate(model, ids, assisted=1)
    for name, value in {"assistant_ensemble_weight": 0.5, "assistant_tokenizer": "any", "use_mtp": True}.items():
        with pytest.raises(ValueError, match=f"{name} is given"):
            generate(model, ids, assisted=True, assistant_model=model, **{name: value})


def test_targets_and_rates_of_a_row_each_are_checked(model):
    ids = batch()[0]
    for value in ([], [2.0, float("nan"), 2.0], [True, 2.0, 2.0], [[2.0]], [2.0, -1.0, 2.0], torch.tensor([2.0, 0.0])):
        for name in ("target", "rate"):
            with pytest.raises(ValueError, match=f"{name} is .*: choose a positive number"):
                Mirostat(**{name: value})
    with pytest.raises(ValueError, match="temperature is"):
        Mirostat(temperature=[1.0, 1.0])
    for name in ("target", "rate"):
        with pytest.raises(ValueError, match=f"{name} has 2 numbers, but there are 3 prompts"):
            generate(model, ids, **{name: [1.0, 2.0]})
        with pytest.raises(ValueError, match=f"{name} has 2 numbers, but the batch has 3 rows"):
            model.generate(ids, logits_processor=[Mirostat(**{name: [1.0, 2.0]})], **ENDLESS, **PLAIN)
