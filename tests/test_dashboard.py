"""Pages of runs: what the files of a folder say is on the page, and nothing of it is run or fetched."""

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import auc, roc_curve
from typer.testing import CliRunner

from hf_xent import cli
from hf_xent.dashboard import Chart, Curve, drawing, read, render, write
from hf_xent.dashboard.cards import rendered
from hf_xent.experiments.detection import Detection, Task
from hf_xent.experiments.detection_report import report_file, roc_points, write_report
from hf_xent.experiments.study import Study

VOID = {"meta", "br", "img", "hr"}
EVIL = "<script>alert(1)</script>"


def png(file):
    from PIL import Image

    Image.new("RGB", (2, 2), "red").save(file)


class Page(HTMLParser):
    """A page's tags, attributes and text; an end tag that closes another tag fails."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(*folders):
    html = render([read(folder) for folder in folders])
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name == "src":
            assert value.startswith("data:")
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html
    return page


def outcome(arm, losses, **more):
    logs = [
        {"step": i, "loss": x, "entropy": x / 2, "learning_rate": 0.1 / i, "grad_norm": x * x}
        for i, x in enumerate(losses, 1)
    ]
    evaluations = [{"loss": 9.25, "perplexity": 77.5, "runtime": 1.0}, {"loss": 8.125, "perplexity": 66.5}]
    found = {
        "arm": arm, "losses": losses, "seconds": [9.0, 0.5, 0.25, 0.5], "memory": [2**20, 3 * 2**20],
        "eval_before": 9.25, "eval_after": 8.125, "tokens_per_step": 8, "logs": logs, "evaluations": evaluations,
    }  # fmt: skip
    return found | more


def put(folder, name, stored):
    file = Path(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(stored if isinstance(stored, str) else json.dumps(stored))
    return Path(folder)


@pytest.fixture
def comparison(tmp_path):
    outcomes = [outcome("stock", [4.0, 3.0, 2.0, 1.0]), outcome("hf_xent", [4.0, 3.0, 2.0, 1.0], memory=[2**20])]
    run = {"model": EVIL, "dataset": "pydoc", "loss": "focal", "steps": 4, "split": None}
    folder = put(tmp_path / EVIL.replace("/", "_"), "results.json", {"run": run, "outcomes": outcomes})
    png(folder / "curves.png")
    return folder


def test_a_comparison_has_its_numbers_curves_settings_and_pictures(comparison):
    folder, page = read(comparison), page_of(comparison)
    assert folder.kinds == ["comparison"] and folder.files == ["results.json", "curves.png"]
    titles = [chart.title for chart in folder.charts]
    assert titles == ["loss", "entropy", "learning rate", "grad norm", "seconds", "memory"]
    loss = folder.charts[0]
    assert [curve.label for curve in loss.curves] == ["stock", "stock (evaluation)", "hf_xent", "hf_xent (evaluation)"]
    assert loss.curves[2].y == [4.0, 3.0, 2.0, 1.0] and loss.curves[3].x == [0, 4] and loss.curves[3].y == [9.25, 8.125]
    held_out, costs = folder.tables
    assert ["perplexity", "77.5", "66.5", "77.5", "66.5"] in held_out.rows and len(held_out.rows) == 2
    assert costs.rows[0] == ["stock", "4", "4 → 1", "0.5", "16", "3"] and costs.rows[1][-1] == "1"
    assert "1.00 times the seconds of stock, and 0.33 times the memory" in page.text
    assert "split" not in folder.settings and "data:image/png" in dict(page.attributes)["src"]


def test_text_of_a_run_stays_text(comparison):
    put(comparison, "README.md", f"---\nlicense: {EVIL}\n---\n# {EVIL}\n<img src=x onerror=alert(1)>\n")
    put(comparison, "predictions.jsonl", json.dumps({EVIL: EVIL}))
    page = page_of(comparison)
    assert page.text.count(EVIL) >= 5 and EVIL.replace("/", "_") in page.text


def test_a_card_is_rendered_and_loads_nothing(tmp_path):
    png(tmp_path / "inside.png")
    png(tmp_path.parent / "outside.png")
    pictures = "![a](inside.png) ![b](https://example.com/x.png) ![c](../outside.png)"
    table = "| a | b |\n|---|---|\n| 1 | *2* |"
    html = rendered(f"<!-- by hand -->\n# Head\n\n{table}\n\n{pictures}\n\n[x](javascript:alert(1))", tmp_path)
    assert "<h1>Head</h1>" in html and "<em>2</em></td>" in html and "by hand" not in html
    assert (
        html.count("<img") == 1 and 'href="https://example.com/x.png">b</a>' in html and 'href="javascript' not in html
    )


def test_a_trainer_s_folder_is_read_from_its_newest_checkpoint(tmp_path):
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    from support.models import tiny

    class Rows(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"input_ids": [i + 1, 2, 3], "labels": [i + 1, 2, 3]}

    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=10, logging_steps=1, eval_strategy="steps", eval_steps=5,
        save_steps=5, report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = Trainer(tiny(), args, train_dataset=Rows(), eval_dataset={"a": Rows(), "b_c": Rows()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    folder = read(tmp_path / "run")
    assert folder.files == ["checkpoint-10/trainer_state.json"] and folder.settings["global_step"] == "10"
    logged = {
        name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in ("loss", "eval_a_loss")
    }
    curves = {curve.label: curve for curve in folder.charts[0].curves}
    assert curves["training"].y == logged["loss"] and curves["training"].x == [*range(1, 11)]
    assert curves["training (evaluation, a)"].y == logged["eval_a_loss"] and "training (evaluation, b_c)" in curves
    assert [chart.title for chart in folder.charts] == ["loss", "learning rate", "grad norm"]
    assert folder.tables[0].rows[0][0] == "loss, a"
    page_of(tmp_path / "run")


def test_results_and_a_trainer_s_state_are_not_drawn_twice(comparison):
    history = [{"step": i, "loss": 1.0, "reward": i} for i in (1, 2)]
    put(comparison, "trainer_state.json", {"log_history": history})
    titles = [chart.title for chart in read(comparison).charts]
    assert titles.count("loss") == 1 and "reward" in titles


def test_a_search_has_its_trials_the_best_first(tmp_path):
    scores = [3.0, None, 2.0, 2.5]
    trials = [
        {"number": i, "parameters": {"rate": 10.0**-i, "loss": "emo"}, "score": x, "error": EVIL if x is None else None}
        for i, x in enumerate(scores)
    ]
    folder = read(put(tmp_path, "trials.json", {"settings": {"direction": "minimize"}, "trials": trials}))
    assert [row[0] for row in folder.tables[0].rows] == ["2", "3", "0", "1"]
    score, by_rate = folder.charts
    assert score.curves[1].y == [3.0, 2.0, 2.0] and by_rate.log_x and sorted(by_rate.curves[0].x) == [1e-3, 1e-2, 1.0]
    assert f"failed: {EVIL}" in page_of(tmp_path).text


def test_a_study_has_means_and_every_seed(tmp_path):
    study = Study("Toy", ("loss",), baseline="plain", output=tmp_path, seeds=2)
    for arm, values in {"plain": [1.0, 3.0], "ours": [2.0, float("nan")]}.items():
        for seed, value in enumerate(values):
            study.record(arm, seed, loss=value)
    folder = read(tmp_path)
    assert folder.tables[0].rows == [["plain", "2", "2 (1.4)"], ["ours", "2", "2"]]
    [chart] = folder.charts
    assert chart.rows == ("plain", "ours") and chart.curves[0].x == [1.0, 3.0, 2.0] and chart.curves[1].x == [2.0, 2.0]
    assert "plain" in page_of(tmp_path).text


def test_a_report_of_detection_has_the_roc_of_scikit_learn(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array([0.0, 1.0] * 40 + [np.nan])
    values = np.round(rng.normal(size=81) + np.nan_to_num(labels), 1)  # with ties
    values[3] = np.nan
    points = roc_points({"min_k": values}, labels)["min_k"]
    kept = np.isfinite(values) & np.isfinite(labels)
    false, true, _ = roc_curve(labels[kept], values[kept], drop_intermediate=False)
    corners = {*zip(points["fpr"], points["tpr"], strict=True)}
    assert corners < {*zip(false.tolist(), true.tolist(), strict=True)}
    assert auc(points["fpr"], points["tpr"]) == pytest.approx(auc(false, true), abs=1e-12)
    run = Detection(Task.members, EVIL, label="label", output=str(tmp_path / "scores.csv"))
    metrics = {"min_k": {"auroc": auc(false, true), "tpr@1%fpr": 0.1, "texts": 79}, "blind": {"auroc": 0.5}}
    summary = {
        "task": "members", "texts": 81, "means": {"min_k": 0.5}, "higher_is": {"min_k": "member"}, "unscored": 1,
        "unlabeled": 1, "metrics": metrics,
    }  # fmt: skip
    assert write_report(run, summary, {"min_k": points}) == report_file(run.output) == tmp_path / "scores.report.json"
    folder, text = read(tmp_path), page_of(tmp_path).text
    [chart] = folder.charts
    assert chart.curves[0].y == points["tpr"] and chart.log_x
    assert f"min_k ({auc(false, true):.3f})" in text and "words alone" in text and EVIL in text


def test_attacks_are_shown_with_their_classes(tmp_path):
    share = {"accuracy": 0.75, "low": 0.5, "high": 0.9, "by_class": {EVIL: 0.5}}
    stored = {
        "run": {"model": "m"}, "clean": share, "attacks": {"pgd": share | {"passes_per_row": 7.5, "seconds": 1.25}},
        "rows_by_class": {EVIL: 4}, "rows": 8, "epsilon": 0.031, "steps": 10, "masking": {"white_box": 0.5},
    }  # fmt: skip
    put(tmp_path, "rows.csv", "attack,row,label\npgd,0,cat\n")
    page = page_of(put(tmp_path, "results.json", stored))
    assert (
        "50.0% to 90.0%" in page.text and f"of {EVIL}" in page.text and "white box" in page.text and "cat" in page.text
    )


def test_a_classifier_without_arms_is_shown(tmp_path):
    one = {
        "task": "text",
        "before": {"accuracy": 0.25},
        "after": {"accuracy": 0.75},
        "losses": [2.0, 1.0],
        "memory": 2**21,
    }
    put(tmp_path, "predictions.csv", "row,text,predicted,score a\n" + "3,some text,a,0.123456789\n" * 25)
    folder = read(put(tmp_path, "results.json", {"run": {}, "outcomes": [one]}))
    held_out, costs, predictions = folder.tables
    assert held_out.rows == [["accuracy", "0.25", "0.75"]] and costs.rows == [["training", "2", "2 → 1", "2"]]
    assert len(predictions.rows) == 20 and predictions.rows[0] == ["3", "some text", "a", "0.1235"]
    assert "first 20 rows" in page_of(tmp_path).text


def test_a_run_that_logs_seldom_and_evaluates_nothing_is_shown(tmp_path):
    logs = [{"step": step, "loss": 1.0 / step} for step in (10, 20)]
    ends = {"eval_before": float("nan"), "eval_after": float("nan"), "evaluations": [{}, {}], "tokens_per_step": 0}
    one = outcome("hf_xent", [0.1, 0.05], logs=logs, seconds=[0.5] * 20, **{**ends, "memory": [2**20]})
    folder = read(put(tmp_path, "results.json", {"run": {"recipe": "sft"}, "outcomes": [one]}))
    [costs] = folder.tables
    assert costs.rows == [["hf_xent", "20", "0.1 → 0.05", "0.5", "1"]] and folder.charts[0].curves[0].x == [10, 20]
    assert "recipe sft" in page_of(tmp_path).text


def test_several_folders_share_charts_and_show_what_differs(tmp_path):
    for name, loss, x in (("one", "focal", 4.0), ("two", "emo", 5.0)):
        run = {"loss": loss, "steps": 3, "output": name}
        put(tmp_path / name, "results.json", {"run": run, "outcomes": [outcome("hf_xent", [x, 3.0, 2.0, 1.0])]})
    page = page_of(tmp_path / "one", tmp_path / "two")
    assert page.tags.count("svg") == 6 and "Settings that differ one two loss focal emo Held-out data" in page.text
    assert "one (evaluation)" in page.text and "hf_xent: " not in page.text
    with pytest.raises(ValueError, match="given twice"):
        page_of(tmp_path / "one", tmp_path / "one")


def test_a_chart_s_marks_stand_at_their_values():
    chart = Chart("t", [Curve("a", [0, 10, 20], [1.0, None, 3.0]), Curve("b", [0, 20], [2.0, 2.0])])
    made = drawing.drawn(chart, {"a": 0, "b": 1})
    ticks = {float(label): place for place, label in made.y_ticks}
    (low, high), (middle, _) = made.curves[0].marks, made.curves[1].marks
    assert low[1] == pytest.approx(ticks[1.0], abs=0.1) and high[1] == pytest.approx(ticks[3.0], abs=0.1)
    assert middle[1] == pytest.approx(ticks[2.0], abs=0.1) and "a: 3 at step 20" in high[2]
    assert made.curves[0].path.count("M") == 2  # the gap
    assert drawing.drawn(Chart("t", [Curve("a", [1], [None])]), {"a": 0}) is None


def test_a_long_curve_keeps_its_spike():
    y = [1.0] * 10_000
    y[4321] = 50.0
    made = drawing.drawn(Chart("t", [Curve("a", [*range(10_000)], y)]), {"a": 0})
    heights = [float(pair.partition(",")[2]) for pair in re.split("[ML]", made.curves[0].path)[1:]]
    assert (
        len(heights) <= 700 and min(heights) == pytest.approx(drawing.TOP, abs=0.1) and len(made.curves[0].marks) <= 130
    )


@pytest.mark.parametrize("y", [[2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [3.000001, 3.000002], [-1e6, 1e6]], ids=str)
def test_ticks_tell_values_apart(y):
    labels = [label for _, label in drawing.drawn(Chart("t", [Curve("a", [1, 2], y)]), {"a": 0}).y_ticks]
    assert labels and len({*labels}) == len(labels)


def test_a_folder_without_anything_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to show: results\.json .* trials\.json"):
        read(tmp_path)
    put(tmp_path / "inside", "trials.json", {"settings": {}, "trials": []})
    with pytest.raises(ValueError, match=r"name a folder inside, such as .*inside"):
        read(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        read(tmp_path / "nonesuch")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"outcomes": 3}', '{"results": []}'])
def test_a_broken_file_is_named(tmp_path, text):
    put(tmp_path, "results.json", text)
    with pytest.raises(ValueError, match=r"results\.json is not what a run writes"):
        read(tmp_path)


def test_a_page_replaces_only_pages(comparison, tmp_path):
    folders, file = [read(comparison)], tmp_path / "page.html"
    assert write(folders, file) == write(folders, file) == file
    file.write_text("mine")
    with pytest.raises(ValueError, match="no page of `hf-xent show`"):
        write(folders, file)
    assert file.read_text() == "mine"


def test_the_command_writes_the_page_and_says_what_it_found(comparison, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    result = CliRunner().invoke(cli.app, ["show", str(comparison), "--json", "--open"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    page = comparison / "index.html"
    assert found["page"] == str(page) and opened == [page.resolve().as_uri()] and Page(page.read_text()).tags
    assert found["folders"][0]["charts"]["loss"][0] == "stock"
