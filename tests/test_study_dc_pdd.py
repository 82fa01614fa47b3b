"""The study of membership: its tiny runs, who reads what how often, the scores in one pass, the Chinese texts."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.studies import chinese, dc_pdd, membership_models
from benchmarks.studies.membership_models import CAPS, DOSES, Corpus, cut
from benchmarks.studies.plan import PILOT_SEED, Job
from hf_xent import detection
from hf_xent.detection.counts import count, smoothed


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("work"), tiny=True)


@pytest.mark.parametrize("plan", dc_pdd.PLANS, ids=lambda plan: plan.name)
def test_every_arm_runs_and_the_model_is_trained_once(plan, job):
    found = {arm: plan.run(arm, 0, job) for arm in plan.arms}
    assert all(set(plan.metrics) <= set(row) for row in found.values())
    assert all(math.isfinite(value) for row in found.values() for value in row.values())
    assert all(0 <= row[metric] <= 1 for row in found.values() for metric in plan.metrics if metric != "recency")
    assert len({tuple(row.values()) for row in found.values()}) > 8  # arms are different scores
    assert {claim.arm for claim in plan.claims} | {claim.against or plan.baseline for claim in plan.claims} <= set(
        found
    )
    made = dc_pdd.experiment(plan.name.rpartition("-")[2], job)
    models = sorted(file.name for file in made.folder.glob("model-*"))
    assert models == sorted(["model-0", "model-1", f"model-{PILOT_SEED}"])  # the seed, its reference, the calibration
    (made.folder / "model-0" / "config.json").unlink()
    assert plan.run(plan.arms[0], 0, job) == found[plan.arms[0]]  # from the scores that were kept


def test_texts_are_read_as_often_as_their_dose_by_one_side_alone(job):
    made = dc_pdd.experiment("english", job)
    for seed in (0, 1, 2):
        own, pair = seed % 2, made.pair(seed)
        read = [piece for *_, piece in pair.order(own, seed)]
        assert len(read) == made.rows
        for side, dose, _, piece in pair.scored():
            assert read.count(piece) == (dose if side == own else 0)
        assert not set(pair.kept) & {piece for *_, piece in pair.scored()} and not set(pair.kept) & set(read)
    assert made.pair(0) is made.pair(1) and made.pair(0).scored() != made.pair(2).scored()


def test_metrics_are_those_of_the_members_they_name(job):
    made, seed = dc_pdd.experiment("english", job), 1
    rows, draw = made.pair(seed).scored(), np.random.default_rng(0)
    values = draw.normal(size=len(rows))
    found = dc_pdd.measured(values, made, seed, "english")
    order = [piece for *_, piece in made.pair(seed).order(1, seed)]
    others = [v for v, row in zip(values, rows, strict=True) if row[0] == 0]

    def auroc(keep):
        own = [v for v, row in zip(values, rows, strict=True) if row[0] == 1 and keep(row)]
        return roc_auc_score([1] * len(own) + [0] * len(others), own + others)

    for dose in DOSES:
        assert found[f"{dose}x"] == pytest.approx(auroc(lambda row, dose=dose: row[1] == dose))
    assert found["repeated"] == pytest.approx(auroc(lambda row: row[1] > 1))
    late = auroc(lambda row: row[1] == 1 and order.index(row[3]) >= 3 * len(order) / 4)
    early = auroc(lambda row: row[1] == 1 and order.index(row[3]) < len(order) / 4)
    assert found["recency"] == pytest.approx(late - early)
    first, second = (
        [v for v, r in zip(values, rows, strict=True) if r[0] == 0 and r[2] == s] for s in ("brown", "wiki")
    )
    assert found["shift"] == pytest.approx(roc_auc_score([1] * len(first) + [0] * len(second), first + second))


def test_scores_of_one_pass_are_those_of_the_package(job):
    made = dc_pdd.experiment("english", job)
    model, tokenizer = made.model(0), made.tokenizer()
    texts = [piece for *_, piece in made.pair(0).scored()][:40]
    q = {name: smoothed(count(rows, tokenizer, len(tokenizer))) for name, rows in (("a", texts[:3]), ("b", texts[3:]))}
    found = membership_models.scored(model, tokenizer, texts, q, lowered=True)
    assert len(found) == 6 + 2 * len(CAPS)
    for table, frequencies in q.items():
        names = ("loss", "min_k", "min_k_pp", "lowercase", "dc_pdd:a=0.1")
        options = {"frequencies": frequencies, "max_tokens": membership_models.TOKENS, "progress": False}
        expected = detection.TextScorer(model, tokenizer, names, **options)(texts)
        for name in names:
            key = f"{name} {table}" if name.startswith("dc_pdd") else name
            exact = detection.get(name).oriented(expected[name])
            assert np.abs(found[key] - exact).max() < 0.05 * np.abs(exact).max()  # bfloat16


def test_pieces_are_cut_and_not_repeated(tmp_path):
    assert cut("one two three four five", 8, spaced=True) == ["one two three", "four five"]
    assert cut("一二三四五六七", 3, spaced=False) == ["一二三", "四五六"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.txt").write_text("同样同样不同", encoding="utf-8")
    corpus = Corpus("x", ("a",), characters=2, other=(), spaced=False)
    assert corpus.pieces(Job(tmp_path, text=tmp_path)) == [("a", "同样"), ("a", "不同")]
    with pytest.raises(ValueError, match=r"no texts in \['b'\]"):
        Corpus("x", ("a", "b"), 2, (), False).pieces(Job(tmp_path, text=tmp_path))


def test_chinese_texts_are_cleaned(tmp_path):
    assert chinese.untagged("[中国/ns  政府/n]nt  、/w  １９９８年/t") == "中国政府、１９９８年"
    page = '.\\" a comment\n.SH "名称 NAME"\n\\fBls\\fR \\- 列出目录\nplain English\n'
    assert chinese.unformatted(page) == '"名称 NAME"\nls - 列出目录'
    (tmp_path / "poet.tang.0.json").write_text(json.dumps([{"title": "春曉", "paragraphs": ["春眠不覺曉、"]}]))
    assert chinese.poems(tmp_path) == ["春曉\n春眠不覺曉、"]
