"""hf-xent: every command, its JSON, its errors in one line, its help."""

import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.main import get_command
from typer.testing import CliRunner

import hf_xent
from hf_xent import cli
from hf_xent.bench import memory
from hf_xent.cli import options, output
from hf_xent.experiments import arms
from hf_xent.experiments.fields import option
from hf_xent.experiments.finetuning import PATCHED, STOCK, Run, fit
from hf_xent.models.quiet import quiet_loading
from hf_xent.patching import comparison
from hf_xent.system.processes import Worker
from support.models import tiny, tiny_tokenizer
from support.zoo import build

runner = CliRunner()
PHASES = ("loading the libraries", "loading the model", "reading the text", "evaluating", "training")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model with a byte-level tokenizer trained on the spot, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(TEXT).save_pretrained(folder)
    tiny(std=0.05).save_pretrained(folder)
    return folder


TEXT = "The quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. " * 8


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT * 4)
    return path


def invoke(*arguments):
    result = runner.invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def small_run(model_folder, text_file, output, *more):
    return invoke(
        *("train", "--model", model_folder, "--dataset", text_file, "--output", output),
        *("--steps", 3, "--batch-size", 2, "--block-size", 16, "--json", *more),
    )


def test_train_saves_a_model_that_loads(model_folder, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    result = small_run(model_folder, text_file, tmp_path / "out", "focal:gamma=1.0")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    run = summary["runs"]["hf_xent"]
    assert run["eval_after"] < run["eval_before"] and run["tokens_per_second"] > 0 and run["peak_memory_mib"] > 0
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(stored["outcomes"][0]["losses"]) == 3 and stored["run"]["loss"] == "focal:gamma=1.0"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 97


def test_a_tail_is_taken_and_a_wrong_one_refused_early(model_folder, text_file, tmp_path):
    assert small_run(model_folder, text_file, tmp_path / "out", "--tail", 0.1).exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"]["tail"] == 0.1
    with pytest.raises(ValueError, match="EMO differentiates 'payload'"):
        invoke("train", "emo", "--model", "nothing/here", "--tail", 0.1)


def test_resume_gives_the_same_losses(model_folder, text_file, tmp_path):
    small_run(model_folder, text_file, tmp_path, "--save-steps", 2)
    losses = json.loads((tmp_path / "results.json").read_text())["outcomes"][0]["losses"]
    with pytest.raises(ValueError, match=r"nothing to resume: checkpoint-3 .* is at step 3 of 3, choose more steps"):
        small_run(model_folder, text_file, tmp_path, "--save-steps", 2, "--resume")
    shutil.rmtree(tmp_path / "checkpoint-3")
    small_run(model_folder, text_file, tmp_path, "--save-steps", 2, "--resume")
    again = json.loads((tmp_path / "results.json").read_text())["outcomes"][0]["losses"]
    assert again == pytest.approx(losses, rel=1e-5)


def test_compare_runs_both_and_they_agree(model_folder, text_file, tmp_path, capfd):
    result = small_run(model_folder, text_file, tmp_path, "--compare")
    assert capfd.readouterr().err == "", "the arms' processes and the libraries in them have nothing to say"
    assert all(f"{arm}: {phase}" in result.stderr for arm in ("stock", "hf_xent") for phase in PHASES)
    summary = json.loads(result.stdout)
    assert set(summary["runs"]) == {"stock", "hf_xent"} and summary["largest_loss_difference"] < 1e-3
    assert not (tmp_path / "model.safetensors").exists()
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert "entropy" in outcomes[1]["logs"][0] and "entropy" not in outcomes[0]["logs"][0]


def test_adapters_and_checkpointing(model_folder, text_file, tmp_path):
    """Both losses train the same adapters, and computing activations again changes nothing but the work."""
    from peft import PeftConfig
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention

    forwards = {False: 0, True: 0}
    run = Run(model=str(model_folder), dataset=str(text_file), steps=3, batch_size=2, block_size=16, lora=2, save=False)
    stock = fit(replace(run, output=str(tmp_path / "stock")), STOCK)
    for again in forwards:

        def count(module, *_, again=again):
            forwards[again] += isinstance(module, LlamaAttention)

        with register_module_forward_pre_hook(count):
            saved = replace(run, gradient_checkpointing=again, save=True, learning_rate=1e-2, output=str(tmp_path))
            ours = fit(saved, PATCHED)
            alike = fit(replace(saved, learning_rate=run.learning_rate, save=False), PATCHED)
        assert alike.losses == pytest.approx(stock.losses, rel=1e-5)
        assert ours.losses[-1] < ours.losses[0] and ours.eval_after < ours.eval_before
    layers, steps = 2, 2 * run.steps
    assert forwards[True] - forwards[False] == layers * steps, "one forward more of each layer and step"
    assert PeftConfig.from_pretrained(tmp_path).r == 2 and not (tmp_path / "model.safetensors").exists()
    moved = [p for n, p in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters() if "lora_B" in n]
    assert len(moved) == 7 * layers and all(p.any() for p in moved)


def test_real_warnings_are_heard_while_libraries_load(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with pytest.warns(UserWarning, match="of substance"), quiet_loading():
        assert os.environ["TQDM_DISABLE"] == "1"
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("of substance", UserWarning, stacklevel=1)
    assert "TQDM_DISABLE" not in os.environ


class InThisProcess(Worker):
    """A worker whose function is called at once, here: two processes would first load the libraries, for seconds."""

    def __init__(self, name, target, *args, remedy=""):
        self.name, self.remedy = name, remedy
        self.pipe, child = multiprocessing.Pipe()
        target(child, *args)

    def close(self, seconds=10):
        self.pipe.close()


def test_an_arm_that_fails_is_reported(model_folder, tmp_path, monkeypatch):
    """It fails before the first step, so it never waits for its turn."""
    monkeypatch.setattr(arms, "Worker", InThisProcess)
    monkeypatch.setattr(memory, "return_large_blocks", lambda: None)  # of processes that end soon
    short = tmp_path / "short.txt"
    short.write_text("the dog")
    with pytest.raises(RuntimeError, match=r"the stock run failed: ValueError: dataset .* choose a smaller block_size"):
        small_run(model_folder, short, tmp_path, "--compare")


def test_check_prints_the_head_and_the_proof(model_folder):
    found = json.loads(invoke("check", model_folder, "--json").stdout)
    assert found["equal"] and found["lean"] and found["vocabulary"] == 97 and found["gradient_error"] < 1e-4
    shown = invoke("check", model_folder).stdout
    assert "equal" in shown and "LlamaForCausalLM" in shown


@pytest.mark.parametrize(
    ("mapping", "model_type"), [("Seq2seq", "t5"), ("Masked LM", "bert"), ("Masked LM", "modernbert")]
)
def test_check_loads_the_class_that_was_saved(mapping, model_type, model_folder, tmp_path):
    from transformers import AutoTokenizer

    model = build(mapping, model_type)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    found = json.loads(invoke("check", tmp_path, "--json").stdout)
    assert found["equal"] and found["lean"] and found["model"] == type(model).__name__


def test_losses_lists_the_registry():
    from hf_xent.losses import LOSSES

    rows = json.loads(invoke("losses", "--json").stdout)
    assert [row["name"] for row in rows] == list(LOSSES)
    lines = invoke("losses", "--markdown").stdout.splitlines()
    assert len(lines) == len(LOSSES) + 2
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}, "a bar in a formula ends no cell"
    assert all(name in invoke("losses").stdout for name in ("focal", "emo"))


def test_bench_writes_its_tables(tmp_path):
    result = invoke(
        *("bench", "--model", "random", "--tokens", 40, "--vocab", 300, "--width", 16, "--repeats", 2),
        *("--contestants", "dense,hf_xent", "--output", tmp_path, "--json"),
    )
    rows = {row["contestant"]: row for row in json.loads(result.stdout)}
    assert set(rows) == {"dense", "hf_xent"} and rows["hf_xent"]["status"] == "ok"
    assert list(tmp_path.glob("*.csv")) and list(tmp_path.glob("*.md"))


def test_a_stopped_sweep_keeps_what_it_measured_and_report_makes_the_rest(tmp_path, monkeypatch):
    from hf_xent import bench

    def run(config, report):
        if config.vocab == 400:
            raise KeyboardInterrupt
        shape = {"N": config.tokens, "V": config.vocab, "D": config.width, "dtype": config.dtype}
        return [bench.Row("dense", "ok", time_ms=1.0, peak_mib=1.0, source="random", device="Slow One", **shape)]

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.chdir(tmp_path)
    sweep = ("--model", "random", "--tokens", "40,48", "--vocab", "300,400", "--width", 16)
    assert invoke("bench", *sweep, "--output", "kept").exit_code != 0
    [path] = (tmp_path / "kept").glob("*.csv")
    assert [(row.N, row.V) for row in bench.from_csv(path)] == [(40, 300), (48, 300)]
    for file in (page := path.with_suffix(".md"), plot := path.with_name(f"{path.stem}-float32-tokens.png")):
        file.unlink()
    (tmp_path / "README.md").write_text("nothing here")
    again = invoke("report", "kept", "--json")
    assert [tmp_path / file for file in json.loads(again.stdout)["written"]] == [page, plot]
    assert page.is_file() and plot.is_file() and "README.md has no table to replace" in again.stderr
    with pytest.raises(ValueError, match="no results of a real model"):  # the readme was asked for
        (tmp_path / "README.md").write_text("<!-- bench --><!-- /bench -->")
        invoke("report", "kept", "--readme", "README.md")


def test_bench_on_a_gpu_keeps_rows_as_they_come(tmp_path, monkeypatch):
    """Its processes replaced by rows nobody measured: those of the journal, the table and the page are written."""
    from hf_xent import bench
    from hf_xent.bench import rows

    limits = []

    def run_shared(configs, journal, report, limit):
        limits.append(limit)
        for config in configs:
            shape = {"N": config.tokens, "V": config.vocab, "D": config.width, "dtype": config.dtype}
            row = bench.Row("dense", "ok", time_ms=1.0, source="random", device="H 200", **shape)
            journal.append(row)
            yield [row]

    monkeypatch.setattr(bench, "run_shared", run_shared)
    monkeypatch.setattr(rows, "device_name", lambda device: "H 200")
    monkeypatch.chdir(tmp_path)
    options = ("bench", "--device", "cuda", "--model", "random", "--shapes", "4x5x6,7x8x9", "--output", tmp_path)
    result = invoke(*options, "--limit", 9, "--json")
    assert [(row["N"], row["V"], row["D"]) for row in json.loads(result.stdout)] == [(4, 5, 6), (7, 8, 9)]
    assert limits == [9] and "delete the file" not in result.stderr
    assert len((tmp_path / "h-200.jsonl").read_text().splitlines()) == 2
    assert [row.N for row in bench.from_csv(tmp_path / "h-200.csv")] == [4, 7] and (tmp_path / "h-200.md").is_file()
    again = invoke(*options)
    assert "h-200.jsonl has 2 rows; those of this commit are not measured again, delete the file" in again.stderr
    (tmp_path / "h-200.csv").unlink()  # as if the run had been killed
    written = json.loads(invoke("report", tmp_path, "--json").stdout)["written"]
    assert [Path(file).name for file in written] == ["h-200.md", "h-200-float32-shapes.png"]
    assert [row.N for row in bench.from_csv(tmp_path / "h-200.csv")] == [4, 7]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as on a machine without it
    assert "no page" in invoke(*options).stderr
    with pytest.raises(ValueError, match="limit is 9, but only on a GPU"):
        invoke("bench", "--device", "cpu", "--limit", 9)


def test_the_command_line_runs_where_it_is_not_installed():
    command = [sys.executable, "-m", "hf_xent.cli", "bench", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "--shapes" in result.stdout


@pytest.mark.parametrize("text", ["", "x,y\n1,2\n"])
def test_tables_of_others_are_no_results(text, tmp_path):
    (tmp_path / "others.csv").write_text(text)
    with pytest.raises(ValueError, match=r"others.csv holds no benchmark results: name the folder that has them"):
        invoke("report", tmp_path)


def test_report_puts_its_table_in_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench -->\n<!-- /bench -->\n")
    results = shutil.copytree(RESULTS, tmp_path / "results")
    shown = invoke("report", results, "--readme", readme)
    assert str(readme) in shown.stdout.replace("\n", "") and "| **hf_xent** |" in readme.read_text()
    with pytest.raises(ValueError, match=r"nowhere.md does not exist: name a file"):
        invoke("report", results, "--readme", tmp_path / "nowhere.md")


def every_command(command=None, path=()):
    """Paths of all commands and groups: (), ('train',), ('ln-free', 'convert') ..."""
    command = command or get_command(cli.app)
    yield path
    for name, part in getattr(command, "commands", {}).items():
        yield from every_command(part, (*path, name))


def test_help_explains_every_option_and_has_an_example():
    paths = list(every_command())
    assert {("train",), ("ln-free", "report"), ("data", "push")} < set(paths)
    for path in paths:
        result = invoke(*path, "--help")
        assert result.exit_code == 0 and "Usage" in result.stdout
        command = get_command(cli.app)
        for name in path:
            command = command.commands[name]
        if hasattr(command, "commands"):
            continue
        _, _, example = " ".join(command.help.split()).partition("Example: hf-xent ")
        words = shlex.split(example)
        assert tuple(words[: len(path)]) == path
        with command.make_context(path[-1], words[len(path) :]):  # its options exist, and take their values
            pass
        assert all(parameter.help for parameter in command.params if parameter.name != "help"), path


def test_fields_of_a_dataclass_become_options():
    @dataclass(frozen=True)
    class Settings:
        name: str = option("Its name.", "x")
        size: int = option("Its size.", 2, min=1)
        flag: bool = option("Off unless asked for.", False)
        keep: bool = option("On unless refused.", True)
        model: str = "tiny"

    seen = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @options.options_from(Settings, positional=("name",), model=options.Model)
    def command(settings: Settings, more: str = "m", as_json: options.Json = False) -> None:
        seen.append((settings, more))
        print("noise")
        output.emit({"name": settings.name}, "for people", as_json=as_json)

    result = runner.invoke(app, ["y", "--size", "3", "--flag", "--no-keep", "--more", "z", "--json"])
    assert json.loads(result.stdout) == {"name": "y"} and "noise" in result.stderr
    assert runner.invoke(app, []).stdout == "noise\nfor people\n"
    assert seen == [(Settings("y", 3, True, False), "z"), (Settings(), "m")]
    assert runner.invoke(app, ["--size", "0"]).exit_code == runner.invoke(app, ["--no-flag"]).exit_code == 2
    text = " ".join(runner.invoke(app, ["--help"]).stdout.split())
    assert "Its size." in text and options.MODEL_HELP in text


def test_experiments_know_nothing_of_the_command_line():
    folder = Path(cli.__file__).parents[1] / "experiments"
    imports = [line for file in folder.glob("*.py") for line in file.read_text().splitlines() if "import " in line]
    assert len(imports) > 20 and not [line for line in imports if "typer" in line or "cli" in line]


def test_help_names_what_the_registries_hold():
    from hf_xent.losses import LOSSES

    shown = " ".join(invoke("train", "--help").stdout.replace("│", " ").split())
    assert all(name in shown for name in LOSSES)


HEAVY = ("torch", "transformers", "datasets", "numpy", "sklearn", "scipy", "matplotlib", "huggingface_hub", "trl")
LISTING = """
import sys
from typer.testing import CliRunner
from hf_xent import cli
from hf_xent.cli import options, output
from hf_xent.experiments.fields import option
for arguments in {calls!r}:
    result = CliRunner().invoke(cli.app, arguments)
    loaded = [name for name in {heavy!r} if name in sys.modules]
    assert result.exit_code == 0 and result.output and not loaded, (arguments, loaded, result.output)
"""


def test_help_and_listings_load_no_heavy_library():
    """All in one process: a command that loads one is the first to be named."""
    calls = [*([*path, "--help"] for path in every_command()), ["losses"], ["losses", "--json"]]
    script = LISTING.format(calls=calls, heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nonesuch"), "loss is 'nonesuch': choose one of cross_entropy"),
        (("train", "focal:gama=2"), "does not take gama: its options are gamma"),
        (("train", "forward_kl"), "it needs a teacher"),
        (("train", "--dtype", "int8"), "dtype is 'int8': choose float32"),
        (("train", "--learning-rate", "nan"), "learning_rate is nan: choose a positive number"),
        (("train", "--compare", "--resume"), "resume is given with compare"),
        (("train", "--compare", "--save-steps", "2"), "save_steps is given with compare"),
        (("bench", "--tokens", "12,x"), "tokens is '12,x': give whole numbers, with commas between them"),
        (("report", "no/such/folder"), "no results in no/such/folder: run `hf-xent bench` first"),
        (("losses", "--json", "--markdown"), "markdown and json are both given"),
        (("attack", "x", "--dataset", "y", "--epsilon", "no"), "epsilon is 'no': choose a number above 0"),
        (("attack", "x", "--dataset", "y", "--method", "no"), "attack is 'no': choose one of pgd"),
        (("check", ""), "model is '', which is empty: give the folder of a checkpoint"),
        (("check", __file__), "test_cli.py', which is a file: give the folder"),
        (("check", "--dtype", "int8"), "dtype is 'int8': choose auto, float32"),
        (("ln-free", "verify", "x", "--dtype", "int8"), "dtype is 'int8': choose auto, float32"),
        (("ln-free", "convert", "", "x"), "model is '', which is empty"),
        (("check", "no/such-model"), "model is 'no/such-model': no local folder, and the Hub cannot provide it"),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-xent", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize("error", [KeyError("text"), TypeError("no\nlines"), AttributeError(), IndexError("far")])
def test_an_unexpected_error_is_one_line_too(error, monkeypatch, capsys):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr("hf_xent.models.loading.load", broken)
    monkeypatch.setattr("sys.argv", ["hf-xent", "check", "some/model"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith(f"error: {type(error).__name__} at test_cli.py:") and "hf-xent --debug" in line
    monkeypatch.setattr("sys.argv", ["hf-xent", "--debug", "check", "some/model"])
    with pytest.raises(type(error)):
        cli.main()


def test_figures_leave_pyplot_as_it_is(tmp_path):
    import matplotlib
    import numpy as np
    from matplotlib import pyplot

    from hf_xent import bench
    from hf_xent.bench import plots
    from hf_xent.experiments import curves
    from hf_xent.experiments.finetuning import Outcome
    from hf_xent.ln_free import report

    before = matplotlib.get_backend()
    matplotlib.use("svg")
    mine = pyplot.figure()
    try:
        outcome = Outcome("stock", [2.0, 1.0], [1.0, 1.0], [9, 9], 2.0, 1.0, 8, [], [])
        shape = {"V": 5, "D": 2, "dtype": "float32", "source": "random", "device": "here"}
        rows = [bench.Row("dense", "ok", N=n, time_ms=1.0, peak_mib=1.0, **shape) for n in (2, 4)]
        drawn = [
            curves.draw_training([outcome], tmp_path / "curves.png", "title"),
            *plots.draw(rows, tmp_path / "bench"),
            report.draw_curves({"one": [(1, 2.0), (2, 1.0)]}, [(1, "ln_1.0")], tmp_path / "deep" / "ln.png"),
            curves.draw_roc(
                {"loss": np.array([1.0, 2.0])}, np.array([1.0, 0.0]), {"loss": {"auroc": 1.0}}, tmp_path / "roc.png"
            ),
        ]
        assert len(drawn) == 4 and all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
        assert matplotlib.get_backend() == "svg" and pyplot.get_fignums() == [mine.number]
    finally:
        pyplot.close(mine)
        matplotlib.use(before)


def test_a_config_file_sets_options_and_the_command_line_goes_before_it(model_folder, text_file, tmp_path):
    (tmp_path / "runs.yaml").write_text("train:\n  loss: focal\n  save-steps: 2\n  tail: 0.1\n  save: false\n")
    invoke(
        *("--config", tmp_path / "runs.yaml", "train", "--model", model_folder, "--dataset", text_file),
        *("--steps", 3, "--batch-size", 2, "--block-size", 16, "--tail", 0, "--output", tmp_path / "out"),
    )
    run = json.loads((tmp_path / "out" / "results.json").read_text())["run"]
    assert (run["loss"], run["save_steps"], run["tail"], run["save"]) == ("focal", 2, 0.0, False)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 3}", r"runs.yaml, train has the unknown name 'stepz': choose among .*steps"),
        ("trian: {steps: 3}", r"runs.yaml has the unknown name 'trian': choose among .*train"),
        ("train: 3", r"runs.yaml, train holds 3: give names with values"),
        ("train: {", r"which is not a readable YAML file"),
    ],
)
def test_a_config_file_with_errors_is_refused(text, message, tmp_path):
    (tmp_path / "runs.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        invoke("--config", tmp_path / "runs.yaml", "losses")
    with pytest.raises(ValueError, match="which is not a readable YAML file"):
        invoke("--config", tmp_path / "nowhere.yaml", "losses")
    (tmp_path / "runs.yaml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"runs.yaml, which is not a readable YAML file"):
        invoke("--config", tmp_path / "runs.yaml", "losses")


def test_quiet_prints_no_table_but_errors_and_json(model_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")  # set by the command, and put back after the test
    assert invoke("--quiet", "check", model_folder).stdout == ""
    assert json.loads(invoke("--quiet", "check", model_folder, "--json").stdout)["equal"] is True
    monkeypatch.setattr("sys.argv", ["hf-xent", "--quiet", "train", "nonesuch"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "loss is 'nonesuch'" in capsys.readouterr().err
    assert "equal" in invoke("check", model_folder).stdout  # the next call speaks again


def test_generate_prints_continuations_and_their_surprise(model_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ("generate", "the quick", "--model", model_folder, "--samples", 3, "--max-new-tokens", 6, "--seed", 4)
    for more in ((), ("--target", 2.0, "--version", 1)):
        rows, again = (json.loads(invoke(*options, *more, "--json").stdout) for _ in range(2))
        assert [row["text"] for row in rows] == [row["text"] for row in again] and len(rows) == 3
        assert all(0 < row["surprise"] < 30 for row in rows)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(4)
    ids = tokenizer(["the quick"] * 3, return_tensors="pt").input_ids
    found = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=6)
    rows = json.loads(invoke(*options, "--json").stdout)
    assert [row["text"] for row in rows] == [
        tokenizer.decode(x, skip_special_tokens=True) for x in found[:, ids.shape[1] :]
    ]
    assert "bits a token" in invoke(*options).stdout
    with pytest.raises(ValueError, match="no chat template"):
        invoke(*options, "--chat")
    own = tmp_path / "own"  # a configuration that would cut everything off
    model.generation_config.update(do_sample=True, top_h=0.1, min_p=0.9, repetition_penalty=9.0)
    model.save_pretrained(own)
    tokenizer.save_pretrained(own)
    assert json.loads(invoke("generate", "the quick", "--model", own, *options[4:], "--json").stdout) == rows


def test_generate_at_several_targets(model_folder):
    options = ("generate", "the quick", "--model", model_folder, "--max-new-tokens", 30, "--samples", 2, "--json")
    rows = json.loads(invoke(*options, "--target", 0.5, "--target", 6.0).stdout)
    assert len(rows) == 4 and max(r["surprise"] for r in rows[:2]) < min(r["surprise"] for r in rows[2:])
    with pytest.raises(ValueError, match=r"target is \[0.5, 0.5, -1.0, -1.0\]: choose a positive number"):
        invoke(*options, "--target", 0.5, "--target", -1)


def test_generate_prints_paths_and_their_weights(model_folder):
    options = ("generate", "the quick", "--model", model_folder, "--max-new-tokens", 6, "--paths", 3, "--seed", 5)
    rows = json.loads(invoke(*options, "--json").stdout)
    weights = [row["weight"] for row in rows]
    assert len({row["text"] for row in rows}) > 1 and weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1) and all(0 < row["surprise"] < 30 for row in rows)
    assert [row["weight"] for row in json.loads(invoke(*options, "--top-p", 1e-6, "--json").stdout)] == [1.0]
    assert f"bits a token, weight {weights[0]:.3f}" in invoke(*options).stdout


def test_generate_with_fewer_bits_in_the_cache(tmp_path):
    """The tokens are those that transformers draws with the same cache, and not those of the exact one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_xent.caches import StaircaseCache
    from hf_xent.generation.prefixes import cache_name

    tiny(std=1.0, max_position_embeddings=512).save_pretrained(tmp_path)
    tiny_tokenizer(TEXT).save_pretrained(tmp_path)
    options = ("generate", TEXT, "--model", tmp_path, "--max-new-tokens", 40, "--seed", 4, "--json")
    exact, fewer = (json.loads(invoke(*options, *more).stdout) for more in ((), ("--cache-bits", "2, 1")))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    inputs, cache = tokenizer(TEXT, return_tensors="pt"), StaircaseCache(model.config, bits=(2, 1))
    torch.manual_seed(4)
    drawn = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=40, **{cache_name(model): cache})
    text = tokenizer.decode(drawn[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert fewer[0]["text"] == text != exact[0]["text"]
    for more in (("--paths", 2), ("--target", 3.0)):
        exact, fewer = (json.loads(invoke(*options, *more, *bits).stdout) for bits in ((), ("--cache-bits", "2,1")))
        assert exact[0]["text"] != fewer[0]["text"], "the bits reach every way to sample"


def test_generate_refuses_what_has_no_effect_and_what_has_no_place(model_folder, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer(TEXT).save_pretrained(tmp_path)
    for arguments, message in (
        (("x", "--rate", 0.5), "rate is an option of Mirostat, which needs a target"),
        (("x", "--version", 1), "version is an option of Mirostat"),
        (("x", "--top-p", 0.5), "top_p is an option of path nucleus: add --paths"),
        (("x", "--length-penalty", 1.0), "length_penalty is an option of path nucleus: add --paths"),
        (("x", "--paths", 2, "--target", 3.0), "target is given, but --paths says what is drawn"),
        (("x", "--paths", 2, "--samples", 1), "samples is given, but --paths"),
        (("x", "--paths", 2, "--top-p", 1.5), r"top_p is 1\.5: choose a number in \(0, 1\]"),
        (("x", "--cache-bits", "8,x"), "cache_bits is '8,x': give whole numbers, with commas"),
        (("x", "--cache-bits", "3"), r"bits=\(3,\): give one or more of"),
        (("x", "--cache-bits", "16"), "cache_bits is 16, with which all is stored as computed"),
        (("x", "--cache-bits", "2", "--max-new-tokens", 8), "cache_bits is 2, but a prompt of 2 tokens and 8 new"),
        (("x", "--temperature", 0), r"temperature is 0\.0"),
        (("x", "--temperature", "nan"), "temperature is nan"),
        (("x", "--target", "nan"), "target is nan: choose a positive number"),
        (("",), "prompt has no token"),
        (("the dog", "--model", tmp_path), "max_new_tokens is 100, the prompt has .* and the model 64 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            invoke("generate", "--model", model_folder, *arguments)


def test_sequences_that_exceed_the_positions_are_refused(text_file, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"and no tokenizer beside it loads .*: save one there"):
        invoke("train", "--model", tmp_path, "--dataset", text_file)
    tiny_tokenizer(TEXT).save_pretrained(tmp_path)
    for name, arguments in (
        ("block_size", ("train", "--model", tmp_path, "--dataset", text_file, "--block-size", 65)),
        ("tokens", ("check", tmp_path, "--tokens", 65)),
        ("length", ("ln-free", "report", tmp_path, "--text", text_file, "--length", 65)),
    ):
        with pytest.raises(ValueError, match=f"{name} is 65, but the model has 64 positions: choose at most 64"):
            invoke(*arguments)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    for command in (("check",), ("ln-free", "verify"), ("bench", "--model")):
        place = tmp_path / "model.safetensors" if command[0] == "bench" else tmp_path
        with pytest.raises(ValueError, match=r"(damaged .*: get them|not a complete file .*: make it)"):
            invoke(*command, place)


def test_debug_shows_the_trace(monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf-xent", "--debug", "train", "nonesuch"])
    with pytest.raises(ValueError, match="nonesuch"):
        cli.main()


def test_the_version_is_shown():
    assert invoke("--version").stdout.strip() == hf_xent.__version__


def test_json_stands_alone_on_standard_output(model_folder, monkeypatch):
    """Whatever libraries print on the way: DeepSpeed, where it is installed, greets on standard output."""
    real = comparison._tokens
    monkeypatch.setattr(comparison, "_tokens", lambda *args: (print("hello"), real(*args))[1])
    found = invoke("check", model_folder, "--json")
    assert json.loads(found.stdout)["equal"] is True and "hello" in found.stderr
