"""Comparisons over seeds: intervals against SciPy's paired test, and runs that resume."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from huggingface_hub import ModelCard
from scipy.stats import ttest_rel

from hf_xent.experiments.study import Study

VALUES = {"plain": [3.0, 3.5, 2.75, 3.25], "ours": [2.5, 3.25, 2.0, 3.5]}


def study(folder, **options):
    return Study("Toy", ("loss",), baseline="plain", output=folder, **{"seeds": 4, **options})


def filled(folder):
    made = study(folder)
    for arm, seed in made.runs(VALUES):
        made.record(arm, seed, loss=VALUES[arm][seed])
    return made


def test_interval_is_the_paired_t_test_s(tmp_path):
    center, half = filled(tmp_path).difference("ours", "loss")
    found = ttest_rel(VALUES["ours"], VALUES["plain"])
    low, high = found.confidence_interval(0.95)
    assert center == pytest.approx(np.subtract(VALUES["ours"], VALUES["plain"]).mean())
    assert (center - half, center + half) == (pytest.approx(low), pytest.approx(high))


def test_differences_are_over_common_seeds_and_need_two(tmp_path):
    made = study(tmp_path)
    made.record("plain", 0, loss=1.0)
    made.record("ours", 0, loss=3.0)
    made.record("ours", 1, loss=9.0)  # the baseline has no such seed
    center, half = made.difference("ours", "loss")
    assert center == 2.0 and np.isnan(half)
    assert made.cell("ours", "loss").endswith("; +2 (one seed)")
    assert made.difference("plain", "loss") is None and made.difference("ours", "other") is None
    assert made.cell("ours", "other") == ""


def test_a_metric_that_is_nan_is_shown_as_such(tmp_path):
    """A run that diverged, or a fit that was refused, is no reason to lose the report; other columns are as ever."""
    made = filled(tmp_path)
    made.record("ours", 1, loss=np.nan)
    assert made.cell("ours", "loss") == "nan (nan); +nan ± nan" and made.cell("plain", "loss") == "3.125 (0.32)"
    assert made.report("Made in a test.") is made.results and np.isnan(study(tmp_path).results["ours"][1]["loss"])


def test_finished_runs_are_not_done_again(tmp_path):
    first = study(tmp_path)
    for arm, seed in first.runs(VALUES):
        if seed == 2:
            break  # cut off
        first.record(arm, seed, loss=VALUES[arm][seed])
    again = study(tmp_path)
    assert list(again.runs(VALUES)) == [(arm, seed) for seed in (2, 3) for arm in VALUES]
    assert again.results == first.results


def test_processes_that_share_a_folder_lose_no_result(tmp_path):
    """Each has objects of its own, as processes do; the lock is of the file."""

    def work(first):
        made = study(tmp_path, first_seed=first, seeds=10)
        for arm, seed in made.runs(("ours",)):
            made.record(arm, seed, loss=seed)
            made.tuned("ours", (seed,), float)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 40, 10)))
    found = study(tmp_path)
    assert found.values("ours", "loss") == {seed: float(seed) for seed in range(40)}
    assert len(found.tried["ours"]) == len(found.cost["ours"]) == 40


def test_what_another_process_has_run_is_not_run_again(tmp_path):
    made, asked = study(tmp_path), []
    for arm, seed in made.runs(VALUES):
        asked.append((arm, seed))
        if len(asked) == 1:
            study(tmp_path).record("ours", 0, loss=1.0)
        made.record(arm, seed, loss=2.0)
    assert len(asked) == 7 and ("ours", 0) not in asked and made.results["ours"][0] == {"loss": 1.0}


def test_results_of_other_settings_are_refused(tmp_path):
    study(tmp_path, settings={"steps": 20}).record("plain", 0, loss=1.0)
    assert study(tmp_path, settings={"steps": 20}).results
    with pytest.raises(ValueError, match="choose another output"):
        study(tmp_path, settings={"steps": 30})


def test_tuned_tries_each_value_once_and_keeps_it(tmp_path):
    made, asked = study(tmp_path), []

    def cut_off(value):
        asked.append(value)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return -((value - 0.1) ** 2)

    with pytest.raises(KeyboardInterrupt):
        made.tuned("ours", (1, 0.1, 0.01), cut_off)
    again = study(tmp_path)
    assert again.tuned("ours", (1, 0.1, 0.01), cut_off) == 0.1 and asked == [1, 0.1, 0.01, 0.01]
    assert study(tmp_path).tuned("ours", (1, 0.1), cut_off, higher=False) == 1 and len(asked) == 4
    again.record("ours", 0, loss=1.0)  # keeps what was tried
    assert study(tmp_path).tried == {"ours": {1.0: pytest.approx(-0.81), 0.1: 0.0, 0.01: pytest.approx(-0.0081)}}


def test_tuned_takes_the_earlier_of_equals_and_no_run_that_diverged(tmp_path, capsys):
    made = study(tmp_path)
    assert made.tuned("ours", (3e-4, 1e-3, 3e-3), {3e-4: np.nan, 1e-3: 0.5, 3e-3: 0.5}.get) == 1e-3
    assert study(tmp_path).tuned("ours", (3e-4, 3e-3), {}.get) == 3e-3  # NaN is read back
    with pytest.raises(ValueError, match=r"values is .0\.0003., of which none has a metric for 'ours': try smaller"):
        made.tuned("ours", (3e-4,), {}.get)
    made.report("Text.")
    card = (tmp_path / "README.md").read_text()
    assert "## Tried on validation rows\n\n- ours: nan at 0.0003, 0.5 at 0.001, 0.5 at 0.003\n" in card


@pytest.mark.parametrize("broken", ["{", "[]", json.dumps({"other": 1})])
def test_what_is_no_results_file_is_refused(tmp_path, broken):
    (tmp_path / "results.json").write_text(broken)
    with pytest.raises(ValueError, match="move it away"):
        study(tmp_path)


def test_report_writes_a_card(tmp_path, capsys):
    results = filled(tmp_path).report("What it shows.", license="apache-2.0", tags=["toy"])
    assert results["ours"][3] == {"loss": 3.5}
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.tags == ["hf_xent", "toy"] and card.data.license == "apache-2.0"
    assert "| ours | 2.812 (0.69); -0.31 ± 0.68 |" in card.text and "What it shows." in card.text
    assert "2.812" in capsys.readouterr().out
