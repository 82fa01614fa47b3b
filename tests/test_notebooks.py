"""The notebooks run from the first cell to the last, on tiny settings and offline, and end with what was checked."""

import json
import os
import warnings
from pathlib import Path

import pytest

from support.models import tiny, tiny_tokenizer

nbformat = pytest.importorskip("nbformat", reason="pip install -e .[dev]")
pytest.importorskip("nbclient", reason="pip install -e .[dev]")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
# What replaces the cell with the tag 'parameters', as papermill does; MODEL and OUTPUT are the test's.
SETTINGS = {
    "quick_start": {"SPLIT": "train[:4%]", "BLOCK": 16, "ROWS": 2, "STEPS": 3},
    "your_own_loss": {"SPLIT": "train[:4%]", "BLOCK": 16, "ROWS": 2, "STEPS": 4, "RATE": 1e-2},
    "detection_audit": {"TEXTS": 16, "WORDS": 24, "EPOCHS": 20, "RATE": 1e-2, "RESAMPLES": 20},
    "ln_free_surgery": {"WIDTH": 16, "LAYERS": 1, "CONTEXT": 16, "ROWS": 2, "PRETRAINING": 10, "STEPS": 12},
}
CHECKED = {
    "quick_start": {"loss_difference", "gradient_difference"},
    "your_own_loss": {"gradient_difference", "entropy_gained"},
    "detection_audit": {"gained", "blind", "spoiled"},
    "ln_free_surgery": {"original", "norms out, no training", "fine-tuned, with norms", "fine-tuned, norms out"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny(std=0.05, vocab_size=200, max_position_embeddings=256).save_pretrained(folder)
    tiny_tokenizer("a small text of few words, def class import return " * 20).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks: most of its start is the import of the libraries."""
    from jupyter_client.manager import KernelManager

    home = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's client
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(home / name.lower()))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(home))
        yield manager
        manager.shutdown_kernel(now=True)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def with_parameters(notebook, values):
    """The notebook with a cell after its parameters that sets some of them anew, and one before that clears names."""
    [place] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assigned = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    namespace: dict = {}
    exec(notebook.cells[place].source, namespace)
    assert values.keys() <= namespace.keys(), "a parameter that the notebook does not have"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(assigned))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    return notebook


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_notebook_runs(kernel, model, tmp_path, name):
    from nbclient import NotebookClient

    values = SETTINGS[name] | {"OUTPUT": str(tmp_path)}
    if name != "ln_free_surgery":
        values["MODEL"] = str(model)
    notebook = with_parameters(read(name), values)
    client = NotebookClient(notebook, km=kernel, timeout=120)
    try:
        client.execute(cleanup_kc=False)
    finally:
        client.kc.stop_channels()
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert json.loads(printed.splitlines()[-1]).keys() == CHECKED[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_notebook_is_committed_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert 8 <= len(notebook.cells) <= 16 and notebook.cells[0].source.startswith("# ")


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*SETTINGS}
