"""Teachers: what each kind says about a batch, against dense logits; caches that resume; servers that fail."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from typer.testing import CliRunner

from hf_xent import cli, losses, teachers
from hf_xent.losses.targets import Several, TopK
from hf_xent.ops import Head
from hf_xent.teachers import LocalTeacher, ServedTeacher, SeveralTeachers, StoredTeacher, load, write_cache
from hf_xent.teachers.documents import documents_of
from hf_xent.teachers.forms import Form, factors_of
from hf_xent.teachers.heads import load_head, save_head
from hf_xent.teachers.index import Index
from hf_xent.teachers.other_vocabulary import OtherVocabularyTeacher, PaddedTeacher
from hf_xent.teachers.placing import parts_of
from hf_xent.teachers.protocols import candidates, words_of
from hf_xent.teachers.tokens import tokenized
from hf_xent.trainers import DistillationConfig, DistillationTrainer
from support.completions_server import serving
from support.models import SETTINGS, V, tiny, tiny_tokenizer
from support.oracle import Largest

LENGTHS = (5, 9, 12, 3, 8, 1, 16, 2)
QUICK = {"retries": 6, "backoff": 0.001, "timeout": 10}


def rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


def data(lengths=LENGTHS):
    return Dataset.from_dict({"input_ids": rows(lengths)})


@cache
def stock():
    """The teacher's own model, unpatched, in float64."""
    return tiny("gemma2 softcap").double()


@cache
def local():
    return LocalTeacher(tiny("gemma2 softcap"))


def dense(document):
    """The teacher's log-probabilities [n, V] of a document alone, in float64."""
    with torch.no_grad():
        return stock()(input_ids=torch.tensor([document])).logits[0].log_softmax(-1)


def padded_batch(documents, left=False):
    width = max(map(len, documents)) + 2
    ids, mask = torch.zeros(2, len(documents), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        at = slice(width - len(document), width) if left else slice(0, len(document))
        ids[row, at], mask[row, at] = torch.tensor(document), 1
        labels[row, at] = torch.tensor(document)
        labels[row, at.start] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_batch(documents, padding=3):
    """One row, as TRL's collator makes it, with a multiple of padding whose positions are 0 and labels -100."""
    ids = torch.tensor([[i for document in documents for i in document] + [0] * padding])
    positions = torch.tensor([[t for document in documents for t in range(len(document))] + [0] * padding])
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def assert_says(target, batch, tolerance=2e-5):
    """A target has the teacher's log-probabilities at every position that a document of the batch has a label for."""
    checked = 0
    for document in documents_of(batch):
        expected = dense(document.ids.tolist())
        at = (document.row, document.columns)
        if isinstance(target, TopK):
            known = target.mask[at]
            found = target.logp[at].double()[known]
            best, ids = expected[known].topk(found.shape[-1])
            torch.testing.assert_close(found, best, atol=tolerance, rtol=0)
            assert torch.equal(target.ids[at][known], ids)
            others = expected[known].scatter(-1, ids, -torch.inf).logsumexp(-1)
            torch.testing.assert_close(target.rest[at].double()[known].exp(), others.exp(), atol=tolerance, rtol=0)
            checked += int(known.sum())
        else:
            hidden, head = target
            torch.testing.assert_close(
                head.logits(hidden[at]).double().log_softmax(-1), expected, atol=tolerance, rtol=0
            )
            checked += len(expected)
    assert checked


@pytest.mark.parametrize("name", ["llama", *SETTINGS, "bert bias", "lora", "offloaded"])
def test_a_local_teacher_says_what_its_dense_logits_do(name):
    model = tiny("llama" if name in ("lora", "offloaded") else name)
    model.train()
    if name == "lora":
        config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config)
    elif name == "offloaded":
        model = cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    documents = rows((16, 14, 15))
    batch = packed_batch(documents, padding=0) if name == "llama" else padded_batch(documents)
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = model.eval()(**inputs, use_cache=False).logits
    model.train()
    with Largest() as largest:
        hidden, head = LocalTeacher(model).targets({**batch, "loss_weight": torch.ones(3)})
    assert largest.numel < expected.numel() or name == "offloaded"  # its head is as large here
    assert model.training and not hidden.requires_grad
    torch.testing.assert_close(head.logits(hidden), expected, atol=2e-6, rtol=1e-5)


STORED = {
    "hidden float32": ({"kind": "hidden", "dtype": "float32"}, 2e-5),
    "hidden float16": ({"kind": "hidden", "dtype": "float16"}, 5e-3),
    "hidden int8": ({"kind": "hidden", "dtype": "int8"}, 0.05),
    "top 1": ({"k": 1, "dtype": "float32"}, 2e-5),
    "top 7": ({"kind": "top_k", "k": 7, "dtype": "float32"}, 2e-5),
    "top 7 float16": ({"k": 7}, 5e-3),
    "all tokens": ({"k": V, "dtype": "float32"}, 2e-5),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_targets_are_found_however_batches_are_made(name, tmp_path):
    options, tolerance = STORED[name]
    written = write_cache(local(), data(), tmp_path / "cache", shard_rows=3, batch_rows=2, **options)
    assert (written.cache.rows, written.cache.tokens) == (len(LENGTHS), sum(LENGTHS)) and written.bytes_per_token > 0
    teacher = load(tmp_path / "cache")
    documents = [rows()[2], rows()[0], rows()[6][:11], rows()[6][:8], rows()[7]]  # two are cut off
    for batch in (padded_batch(documents), padded_batch(documents, left=True), packed_batch(documents)):
        assert_says(teacher.targets(batch), batch, tolerance)
    raw = load_dataset(
        "arrow", data_files=str(tmp_path / "cache" / "*.arrow"), split="train", cache_dir=tmp_path / "hub"
    )
    assert_says(StoredTeacher.from_dataset(raw.shuffle(seed=1), teacher.head).targets(batch), batch, tolerance)


@pytest.mark.parametrize("strategy", [None, "bfd"])
def test_batches_that_trl_packs_are_found(strategy, tmp_path):
    write_cache(local(), data(), tmp_path / "cache", k=4, dtype="float32")
    dataset = data().map(lambda row: {"labels": row["input_ids"]})
    dataset = pack_dataset(dataset, 24, strategy) if strategy else dataset
    padding_free = strategy == "bfd"
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=8)
    batch = collator([dataset[i] for i in range(len(dataset))])
    target = load(tmp_path / "cache").targets(batch)
    assert_says(target, batch)
    predicts = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    assert predicts.any() and target.mask[predicts].all()


def test_batches_say_where_documents_are():
    a, b, c = rows((4, 3, 2))
    ids = torch.tensor([[*a, *b, *c]])
    for key, value in {
        "seq_idx": torch.tensor([[0] * 4 + [1] * 3 + [2] * 2]),
        "cu_seq_lens_q": torch.tensor([0, 4, 7, 9]),
        "attention_mask": torch.tensor([[1] * 4 + [2] * 3 + [3] * 2]),
        "position_ids": torch.tensor([[[0, 1, 2, 3, 0, 1, 2, 0, 1]]] * 3),
    }.items():
        assert [document.ids.tolist() for document in documents_of({"input_ids": ids, key: value})] == [a, b, c], key
    labels = torch.full_like(ids, -100)
    labels[0, 5] = 7  # only the second document has a label
    batch = {"input_ids": ids, "seq_idx": torch.tensor([[0] * 4 + [1] * 3 + [2] * 2]), "labels": labels}
    assert [(d.columns.start, d.columns.stop) for d in documents_of(batch)] == [(4, 7)]
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 1, 9, 9\): pass one number per token"):
        [*documents_of({"input_ids": ids, "attention_mask": torch.ones(1, 1, 9, 9)})]


def test_an_index_compares_tokens_and_finds_prefixes():
    stored = [np.array(x, dtype=np.int32) for x in ([1, 2, 3, 4, 5], [1, 2, 3, 9], [7], [])]
    index = Index(stored, lambda number: stored[number])
    for asked, expected in (([1, 2, 3, 9], 1), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7], 2), ([1, 2, 4], None)):
        assert index.find(np.array(asked, dtype=np.int32)) == expected
    index.keys[:] = index.keys[0]  # as if every hash were the same
    assert index.find(np.array([1, 2, 3, 9], dtype=np.int32)) in (1, None)


@pytest.mark.parametrize("objective", ["forward_kl:temperature=2.0", "reverse_kl", "jsd", "total_variation"])
def test_losses_of_stored_targets_are_those_of_the_model(objective, tmp_path):
    """Also those of its most probable tokens, if these are all."""
    temperature = 2.0 if "temperature" in objective else 1.0
    write_cache(local(), data(), tmp_path / "hidden", kind="hidden", dtype="float32", batch_rows=3)
    write_cache(local(), data(), tmp_path / "all", k=V, dtype="float32", temperature=temperature, batch_rows=3)
    batch = packed_batch([rows()[1], rows()[4]])
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:]
    student = torch.randn(1, labels.shape[1], 6, requires_grad=True)
    head = Head(torch.randn(V, 6, requires_grad=True))
    found = []
    for teacher in (local(), load(tmp_path / "hidden"), load(tmp_path / "all")):
        loss = losses.get(objective)(student, head, labels, teacher=teacher.targets(batch))
        found.append((loss, *torch.autograd.grad(loss, (student, head.weight))))
    for stored in found[1:]:
        torch.testing.assert_close(stored, found[0], atol=1e-5, rtol=1e-4)


def test_what_is_not_stored_is_an_error_of_one_line(tmp_path):
    folder = tmp_path / "cache"
    write_cache(local(), data(), folder, kind="hidden")
    teacher = load(folder)
    unknown = padded_batch([rows()[1], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    with pytest.raises(
        ValueError, match=r"no document that begins with the 9 tokens \[5, 6, .*, \.\.\.\] of row 1 .*max_len"
    ):
        teacher.targets(unknown)
    labeled = padded_batch([rows()[1], rows()[0]], left=True)
    labeled["labels"] = torch.where(labeled["attention_mask"] == 1, labeled["input_ids"], -100)
    with pytest.raises(ValueError, match=r"labels has one at row 0, position 2, that only padding precedes"):
        teacher.targets(labeled)
    nothing = {**unknown, "labels": torch.full_like(unknown["labels"], -100)}
    assert teacher.targets(nothing)[0].shape == (2, 11, 32)
    with pytest.raises(ValueError, match=r"the data set has hidden states but no head: pass the teacher's"):
        StoredTeacher.from_dataset(Dataset.from_dict({"input_ids": [[1]], "hidden": [[[0.5]]]}))
    with pytest.raises(
        ValueError, match=r"has the columns input_ids: a teacher needs input_ids, and hidden or ids and"
    ):
        StoredTeacher.from_dataset(data())
    with pytest.raises(ValueError, match=r"tail is 'none': choose class, uniform, student"):
        load(folder, tail="none")
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 1 files: run the command that writes it again"):
        load(folder)


def test_columns_of_a_users_data_set_are_targets_too():
    documents = rows()[:3]
    expected = [dense(document).topk(4) for document in documents]
    columns = {"ids": [x.indices.tolist() for x in expected], "logp": [x.values.tolist() for x in expected]}
    dataset = Dataset.from_dict({"input_ids": documents, **columns, "text": ["a", "b", "c"]})
    batch = padded_batch(documents)
    target = StoredTeacher.from_dataset(dataset, tail="uniform").targets(batch)
    assert_says(target, batch)
    assert target.tail == "uniform" and not target.mask[0, len(documents[0]) :].any()
    hidden = torch.randn(*batch["input_ids"].shape, 8, requires_grad=True)
    losses.get("forward_kl")(hidden, Head(torch.randn(V, 8)), batch["input_ids"], teacher=target).backward()
    told = hidden.grad[target.mask]
    assert torch.isfinite(hidden.grad).all() and told.abs().sum() == hidden.grad.abs().sum() > 0  # none by the others


class Stopped(Exception):
    """The power went out."""


class Unreliable(LocalTeacher):
    """A teacher that fails after some batches."""

    def __init__(self, batches):
        super().__init__(tiny("gemma2 softcap"))
        self.batches = batches

    def targets(self, batch):
        if self.batches == 0:
            raise Stopped
        self.batches -= 1
        return super().targets(batch)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["hidden", "int8", "top_k"])
def test_a_resumed_cache_is_the_uninterrupted_one_byte_for_byte(kind, tmp_path):
    options = {"kind": "hidden", "dtype": "int8"} if kind == "int8" else {"kind": kind}
    options |= {"shard_rows": 3, "batch_rows": 2, "tokenizer": tiny_tokenizer(), "source": "here"}
    steps = []
    whole = write_cache(local(), data(), tmp_path / "whole", progress=lambda *x: steps.append(x), **options)
    assert steps == sorted(steps) and steps[-1] == (sum(LENGTHS), sum(LENGTHS)) and whole.skipped == 0
    for batches in (0, 1, 3):
        with pytest.raises(Stopped):
            write_cache(Unreliable(batches), data(), tmp_path / "parts", **options)
        with pytest.raises(ValueError, match=r"run the command that writes it again, which continues"):
            load(tmp_path / "parts")
    (tmp_path / "parts" / ".data-00000-of-00003.77.arrow").write_text("of a run that was killed")
    written = write_cache(local(), data(), tmp_path / "parts", **options)
    assert written.skipped == 1 and contents(tmp_path / "parts") == contents(tmp_path / "whole")
    again = write_cache(Unreliable(0), data(), tmp_path / "parts", **options)  # asks nothing
    assert again.skipped == 3 and again.bytes == whole.bytes


def test_another_cache_in_a_folder_is_refused(tmp_path):
    folder = tmp_path / "cache"
    write_cache(local(), data(), folder, k=5)
    for change, message in {
        ("k", 6): "a cache with k = 5, not 6",
        ("dtype", "float32"): "a cache with dtype = 'float16', not 'float32'",
        ("kind", "hidden"): "a cache with kind = 'top_k', not 'hidden'",
        ("batch_rows", 2): "a cache with batch_rows = 8, not 2",
        ("temperature", 2.0): "a cache with temperature = 1.0, not 2.0",
    }.items():
        options = {"k": 5, **dict([change])}
        options = {"kind": "hidden"} if change[0] == "kind" else options
        with pytest.raises(ValueError, match=message):
            write_cache(local(), data(), folder, **options)
    with pytest.raises(ValueError, match=r"a cache with content = '\w+', not '\w+': choose another folder"):
        write_cache(local(), data((5, 9)), folder, k=5)
    changed = local()
    changed.model.lm_head.weight.data[0] += 1  # as after more training, in the same folder
    with pytest.raises(ValueError, match=r"a cache with weights = '\w+\.\.\., not '\w+\.\.\.: choose another folder"):
        write_cache(changed, data(), folder, k=5)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"which is no cache and not empty: choose another"):
        write_cache(local(), data(), other)
    for options, message in (
        ({"k": 0}, "k is 0: choose a whole number from 1 to 1024"),
        ({"k": 98}, f"k is 98, but the teacher has {V} tokens"),
        ({"kind": "logits"}, "kind is 'logits': choose 'hidden' or 'top_k'"),
        ({"dtype": "int8"}, "dtype is 'int8': for top_k, choose float16 or float32"),
        ({"kind": "hidden", "k": 4}, "k is 4, which hidden states do not depend on"),
        ({"shard_rows": 0}, "shard_rows is 0: choose a whole number of at least 1"),
        ({"rows": 3}, "write_cache does not take 'rows'"),
    ):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        with pytest.raises(ValueError, match=message):
            write_cache(local(), data(), tmp_path / "new", **options)
    with pytest.raises(ValueError, match=r"dataset has text: pass one with input_ids"):
        write_cache(local(), [{"text": "a"}], tmp_path / "new")


def test_int8_is_off_by_half_a_step_and_float16_refuses_what_it_cannot_hold():
    hidden = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * 100
    hidden[3] = 0
    hidden[:, 1] *= 1000  # features of language models differ like this
    form = Form("hidden", dtype="int8")
    for factors in (1.0, factors_of(hidden)):
        found = form.encoded({"hidden": hidden}, factors)
        error = np.abs(form.decoded(found)["hidden"] * factors - hidden)
        assert (error <= found["scale"][:, None] * factors * 0.5001).all()
    assert error[:, 0].max() < 2  # and not some hundreds
    assert [Form("hidden", dtype=x).bytes_per_token(576) for x in ("float16", "int8")] == [1156, 584]
    assert [Form("top_k", k).bytes_per_token() for k in (1, 16, 64)] == [14, 104, 392]
    with pytest.raises(ValueError, match=r"dtype is 'float16', which does not hold all hidden states: choose float32"):
        Form("hidden").encoded({"hidden": hidden * 1000})


def test_a_head_is_written_as_it_is(tmp_path):
    options = {"scale": 0.5, "softcap": 3.0, "fp32": True}
    tensors = {"weight": torch.randn(9, 4), "bias": torch.randn(9), "adapter": torch.randn(9, 2), "gain": torch.rand(9)}
    head, hidden = Head(**tensors, **options), torch.randn(3, 6)
    found, _ = load_head(save_head(head, tmp_path / "head.safetensors"))
    factors = np.array([0.25, 1, 8, 2, 0.5, 16], np.float32)
    scaled, kept = load_head(save_head(head, tmp_path / "scaled.safetensors", factors))
    assert kept is not None and kept.tolist() == factors.tolist()
    torch.testing.assert_close(scaled.logits(hidden / torch.from_numpy(factors)), head.logits(hidden))
    assert torch.equal(found.logits(hidden), head.logits(hidden)) and found.fp32


def test_several_teachers_are_a_weighted_sum():
    other = LocalTeacher(tiny("llama", std=0.3))
    both = SeveralTeachers([local(), other], [3, 1])
    batch = padded_batch(rows()[:3])
    target = both.targets(batch)
    assert isinstance(target, Several) and target.weights == (0.75, 0.25) and " + 0.25 " in both.name
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:]
    student = torch.randn(*labels.shape, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 6, dtype=torch.float64, requires_grad=True)
    parts = tuple((hidden.double(), head.to(torch.float64)) for hidden, head in target.parts)
    valid = labels != -100
    p, q = (head.logits(hidden)[valid].softmax(-1) for hidden, head in parts)
    z = student @ weight.T
    logp = z[valid].log_softmax(-1)
    mixture = 0.75 * p + 0.25 * q
    to_mixture = (mixture * (mixture.log() - logp)).sum(-1)
    apart = (0.75 * p * (p.log() - mixture.log()) + 0.25 * q * (q.log() - mixture.log())).sum(-1)
    nll = -logp.gather(-1, labels[valid][:, None]).squeeze(-1)
    expected = {
        "forward_kl": to_mixture + apart,  # distilling the mixture, up to what the student has no part in
        "forward_kl:ce_weight=0.25": 0.75 * (to_mixture + apart) + 0.25 * nll,  # which is counted once
        "total_variation": (0.75 * (p - logp.exp()).abs() + 0.25 * (q - logp.exp()).abs()).sum(-1) / 2,
    }
    for name, losses_of_tokens in expected.items():
        loss, stats = losses.get(name).compute(
            student, Head(weight), labels, teacher=Several(parts, (0.75, 0.25)), observe=("entropy",)
        )
        found = (loss, *torch.autograd.grad(loss, (student, weight)))
        mean = losses_of_tokens.mean()
        torch.testing.assert_close(found, (mean, *torch.autograd.grad(mean, (student, weight), retain_graph=True)))
        torch.testing.assert_close(stats.loss[valid], losses_of_tokens)
        torch.testing.assert_close(stats.entropy[valid], -(logp.exp() * logp).sum(-1))
        unreduced = losses.get(name)(
            student, Head(weight), labels, teacher=Several(parts, (0.75, 0.25)), reduction="none"
        )
        torch.testing.assert_close(unreduced[valid], losses_of_tokens)
    for weights, message in (
        ([1], "1 weights are given for 2 teachers"),
        ([-1, 1], "finite numbers >= 0"),
        ([0, 0], "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SeveralTeachers([other, other], weights)
    with pytest.raises(ValueError, match=r"choose numbers >= 0 whose sum is 1"):
        Several(parts, (0.5, 0.4))


def words():
    """A tokenizer with a word for each token."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


@pytest.mark.parametrize("form", ["vllm", "ids", "text", "strict"])
def test_a_served_teacher_says_what_the_model_does(form):
    with serving(stock(), form, tokenizer=words()) as server:
        teacher = load(server.url, k=5, tokenizer=words() if form in ("text", "strict") else None, **QUICK)
        assert isinstance(teacher, ServedTeacher) and teacher.name == "tiny"
        for batch in (padded_batch(rows()[:4]), packed_batch(rows()[:3])):
            target = teacher.targets(batch)
            assert_says(target, batch)
            for document in documents_of(batch):
                known = target.mask[document.row, document.columns]
                assert known[:-1].all() and not known[-1]
    assert {"vllm": "prompt_logprobs", "ids": "echo_ids", "text": "echo_ids", "strict": "echo"}[
        form
    ] == teacher.protocol
    assert server.bodies[-1]["model"] == "tiny" and len(server.bodies) <= 7 + 2  # what it does not know is asked once


def test_words_that_several_tokens_share_leave_a_position_without_an_opinion():
    class Words:
        def __len__(self):
            return 4

        def batch_decode(self, ids):
            return [["a", "b", "b", "c"][i] for [i] in ids]

        def convert_ids_to_tokens(self, ids):
            return [f"_{i}" for i in ids]

    token_of = words_of(Words())
    assert [token_of(word) for word in ("a", "b", "c", "_2", "d")] == [0, None, 3, 2, None]
    top = [None, {"a": -1.0, "c": -2.0}, {"a": -1.0, "b": -2.0}, {"b": -1.0, "c": -0.5, "a": -2.5}]
    answer = {"choices": [{"logprobs": {"tokens": ["c", "a", "b", "a"], "top_logprobs": top}}]}
    found = candidates("echo", answer, [3, 0, 1, 0], 2, token_of)
    assert found == [[(0, -1.0), (3, -2.0)], None, None]


FAULTS = [429, 500, 503, "cut", "hang up", "no JSON", "short", "few", "other"]


@pytest.mark.parametrize("form", ["vllm", "ids"])
def test_a_server_that_fails_now_and_then_loses_nothing(form, tmp_path):
    with serving(stock(), form) as server:
        teacher = ServedTeacher(server.url, k=5, **{**QUICK, "retries": len(FAULTS)})
        batch = padded_batch(rows()[:3])
        expected = teacher.targets(batch)
        server.faults = list(FAULTS)
        found = teacher.targets(batch)
        assert not server.faults and torch.equal(found.logp, expected.logp) and torch.equal(found.ids, expected.ids)
        write_cache(teacher, data(), tmp_path / "whole", shard_rows=3, batch_rows=2)
        failing = ServedTeacher(server.url, "tiny", k=5, **{**QUICK, "retries": 0})
        for healthy in (1, 4):
            server.faults = [None] * healthy + [500] * 3
            with pytest.raises(
                RuntimeError, match=r"/v1/completions gave no usable answer in 1 attempts, .* status 500"
            ):
                write_cache(failing, data(), tmp_path / "parts", shard_rows=3, batch_rows=2)
        server.faults = []
        write_cache(failing, data(), tmp_path / "parts", shard_rows=3, batch_rows=2)
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    batch = padded_batch(rows()[:4])
    assert_says(load(tmp_path / "parts").targets(batch), batch, 5e-3)
    with pytest.raises(
        RuntimeError, match=r"in 2 attempts, the last time no answer \(ConnectionRefusedError: .*written st"
    ):
        ServedTeacher(server.url, "tiny", k=5, **{**QUICK, "retries": 1}).targets(batch)


def test_what_a_server_will_never_do_is_an_error_at_once(tmp_path):
    batch = padded_batch(rows()[:1])
    with serving(stock(), "vllm", names=("a", "b")) as server:
        for status, message in (
            (401, "pass api_key, or set OPENAI_API_KEY"),
            (404, "check the address"),
            (413, "as it says"),
        ):
            server.faults = [status]
            with pytest.raises(RuntimeError, match=rf"status {status} \(.*not now.*\): .*{message}"):
                ServedTeacher(server.url, "a", k=5, **QUICK).targets(batch)
        assert len(server.bodies) == 3
        with pytest.raises(RuntimeError, match=r"has the models a, b: pass one as model"):
            ServedTeacher(server.url, **QUICK)
        server.faults = ["few"] * 2
        with pytest.raises(
            RuntimeError, match=r"4 of 5 log-probabilities of a token \(start vLLM with --max-logprobs 5"
        ):
            ServedTeacher(server.url, "a", k=5, retries=1, backoff=0.001).targets(padded_batch([[3, 3, 3]]))
        with pytest.raises(ValueError, match=r"kind is 'hidden', but this teacher has none, only a TopK"):
            write_cache(ServedTeacher(server.url, "a", k=5), data(), tmp_path / "never", kind="hidden")
    not_told = pytest.raises(RuntimeError, match=r"the token 'w\d+' as text \(pass the tokenizer")
    with serving(stock(), "text", tokenizer=words()) as server, not_told:
        ServedTeacher(server.url, "a", k=5, retries=0).targets(batch)
    with pytest.raises(ValueError, match=r"url is 'ftp://x': write it as"):
        ServedTeacher("ftp://x", "a")


def test_load_takes_whatever_names_a_teacher(tmp_path):
    model = tiny(std=0.05)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_cache(LocalTeacher(model), data(), tmp_path / "cache", k=3)
    teacher = load(model)
    assert teacher.model is model and load(teacher) is teacher
    both = load([str(tmp_path / "model"), tmp_path / "cache"], weights=[1, 3], tail="student", dtype="bfloat16")
    assert both.weights == (0.25, 0.75) and both.teachers[1].tail == "student"
    assert both.teachers[0].model.dtype == torch.bfloat16
    own = tiny_tokenizer()
    own.add_tokens("<more>")
    padded = load(str(tmp_path / "model"), tokenizer=own)
    assert isinstance(padded, PaddedTeacher) and isinstance(*parts_of(padded), LocalTeacher)
    other = load(
        str(tmp_path / "model"), tokenizer=tiny_tokenizer("other words make other tokens " * 8), others="ignore"
    )
    assert isinstance(other, OtherVocabularyTeacher) and other.others == "ignore"
    assert [*parts_of(SeveralTeachers([other, teacher]))] == [other.teacher, teacher]
    for spec, options, message in (
        (model, {"tail": "class"}, "tail is 'class', which has no effect on a model: leave it out"),
        (tmp_path / "cache", {"k": 3}, "k is 3, which has no effect on a cache"),
        (teacher, {"device": "cpu"}, "device is 'cpu', which has no effect on a teacher already"),
        (teacher, {"weights": [1.0]}, "weights are .*, but there is one teacher"),
        (str(tmp_path / "model"), {"others": "class"}, "others is 'class', but tokenizer is None"),
        (
            str(tmp_path / "model"),
            {"others": "class", "tokenizer": own},
            "others is 'class', but .* has the student's vocabulary",
        ),
        (str(tmp_path / "nowhere"), {}, "model is '.*nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(spec, **options)
    assert set(teachers.__all__) == {*teachers.FILES}


TEXTS = ["the quick brown fox", "jumps over the lazy dog again and again", "the dog"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
def test_documents_are_tokenized_as_trl_does(tmp_path):
    from trl import SFTConfig, SFTTrainer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    for dataset in (
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"prompt": TEXTS, "completion": TEXTS[::-1]}),
        Dataset.from_dict({"messages": [turns]}),
    ):
        args = SFTConfig(output_dir=tmp_path, max_length=9, use_cpu=True, bf16=False, report_to=[])
        trainer = SFTTrainer(tiny(), args, train_dataset=dataset, processing_class=tokenizer)
        found = tokenized(dataset, tokenizer, max_length=9)
        trained = trainer.train_dataset["input_ids"][:]  # without documents whose completions are cut off
        assert trained and all(ids in found["input_ids"][:] for ids in trained)
    assert tokenized(data(), tokenizer)["input_ids"][:] == rows()
    with pytest.raises(ValueError, match=r"has the columns body: name the one that holds text"):
        tokenized(Dataset.from_dict({"body": TEXTS}), tokenizer)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as above
def test_training_from_a_cache_is_training_from_the_model(tmp_path):
    tokenizer = tiny_tokenizer()
    dataset = Dataset.from_dict({"text": TEXTS * 3})
    documents = tokenized(dataset, tokenizer)
    write_cache(local(), documents, tmp_path / "hidden", kind="hidden", dtype="float32")
    write_cache(local(), documents, tmp_path / "all", k=V, dtype="float32")
    found = []
    for teacher in (local(), [str(tmp_path / "hidden"), str(tmp_path / "all")]):  # both are the model
        options = {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "disable_tqdm": True}
        options |= {"max_steps": 2, "learning_rate": 1e-3, "packing": True, "max_length": 24}  # some are cut off
        args = DistillationConfig(output_dir=tmp_path, per_device_train_batch_size=2, **options)
        student = tiny("llama", std=0.05)
        trainer = DistillationTrainer(student, teacher, args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_the_command_writes_a_cache_that_training_finds(tmp_path):
    tiny(std=0.05).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    config = tmp_path / "config.yaml"
    config.write_text("distill: {cache: {k: 3, max_length: 8}}")
    command = ["--config", config, "distill", "cache", tmp_path / "model", tmp_path / "texts.jsonl"]
    command += ["--output", tmp_path / "cache"]
    result = CliRunner().invoke(cli.app, [*map(str, command), "--json"], catch_exceptions=False)
    summary = json.loads(result.stdout)
    assert f"{summary['tokens']} tokens of 26 bytes, about 0.0 MB in" in " ".join(result.stderr.split())
    assert (summary["rows"], summary["k"], summary["files"], summary["files_before"]) == (3, 3, 1, 0)
    again = CliRunner().invoke(cli.app, [*map(str, command)], catch_exceptions=False)
    assert "1, of which 1 were there before" in again.stdout and "bytes per token" in again.stdout
    card = (tmp_path / "cache" / "README.md").read_text()
    assert "the 3 most probable next tokens" in card and "path: data-*.arrow" in card
    assert "# What model says about texts.jsonl" in card and str(tmp_path) not in card
    documents = tokenized(Dataset.from_dict({"text": TEXTS}), tiny_tokenizer(), max_length=6)["input_ids"]
    assert load(tmp_path / "cache").targets(padded_batch(documents)).mask.any()
    answers = tmp_path / "answers.jsonl"  # with a text, which is not what training by completions reads
    answers.write_text("\n".join(json.dumps({"prompt": x, "completion": " dog", "text": "fox"}) for x in TEXTS))
    command = ["distill", "cache", tmp_path / "model", answers, "--column", "completion", "--k", 3]
    command += ["--output", tmp_path / "completions", "--json"]
    CliRunner().invoke(cli.app, [*map(str, command)], catch_exceptions=False)
    found = load(tmp_path / "completions").rows.with_format(None)["input_ids"][:]
    assert tiny_tokenizer()(TEXTS[0] + " dog</s>")["input_ids"] in found
    assert len(load_dataset(str(tmp_path / "cache"), split="train", cache_dir=tmp_path / "hub")) == 3
    with pytest.raises(ValueError, match=r"tokenizer is not given: name that of the server's model"):
        CliRunner().invoke(cli.app, ["distill", "cache", "http://127.0.0.1:9/v1", "pydoc"], catch_exceptions=False)
