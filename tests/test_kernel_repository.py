"""The kernel repository: its layout, its code without hf_xent, and the same numbers as torch's dense cross-entropy."""

import ast
import base64
import hashlib
import json
import os
import runpy
import subprocess
import sys
import tomllib
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "distribution" / "kernels" / "build.py"), run_name="build")["build"]
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
FOUND = find_spec("kernels")
KERNELS = Path(FOUND.origin).parents[1] if FOUND else Path(sys.prefix) / "kernels"
"""A folder of its own, since bitsandbytes asks the Hub for kernels wherever the package is."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return BUILD(tmp_path_factory.mktemp("kernels") / "hf-xent-ops")


def metadata(repository, variant):
    return json.loads((repository / "build" / variant / "metadata.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("variant", "backend"), VARIANTS.items())
def test_the_metadata_describe_every_file(repository, variant, backend):
    folder, found = repository / "build" / variant, metadata(repository, variant)
    general = tomllib.loads((repository / "build.toml").read_text(encoding="utf-8"))["general"]
    assert {key: found[key] for key in ("name", "version", "license")} == {
        key: general[key] for key in ("name", "version", "license")
    }
    assert found["backend"] == {"type": backend} and found["python-depends"] == []
    assert found["id"].isidentifier() and found["id"].startswith(f"_hf_xent_ops_{backend}_")
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    assert {"__init__.py", "layers.py", "hf_xent_ops/__init__.py", "ops/gpu/kernels.py"} <= set(written)
    hashes = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in written.items()}
    assert found["digest"]["algorithm"] == "sha256"
    assert {name: base64.b64decode(text) for name, text in found["digest"]["files"].items()} == hashes


def test_the_repository_is_whole(repository):
    assert {path.name for path in repository.iterdir()} == {"build", "README.md", "build.toml", "LICENSE"}
    assert {path.name for path in (repository / "build").iterdir()} == set(VARIANTS)
    with pytest.raises(ValueError, match="there already"):
        BUILD(repository)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_import_torch_and_one_another(repository, variant):
    """`kernels` names the package by its id, so that its own name would be another version's."""
    folder = repository / "build" / variant
    for path in folder.rglob("*.py"):
        here = path.relative_to(folder).parent
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                above = (folder / here).parents[node.level - 2] if node.level > 1 else folder / here
                target = above.joinpath(*(node.module or "").split("."))
                assert target.is_relative_to(folder)
                assert target.is_dir() or target.with_suffix(".py").exists(), f"{path.name} imports {node.module}"
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "triton"}


def load(repository, variant):
    """As `kernels` loads it: under its id, from where it lies."""
    name = metadata(repository, variant)["id"]
    spec = spec_from_file_location(name, repository / "build" / variant / "__init__.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(repository):
    before = set(sys.modules)
    yield {variant: load(repository, variant) for variant in VARIANTS}  # both, beside hf_xent, in one process
    for name in set(sys.modules) - before:
        if name.startswith("_hf_xent_ops"):
            del sys.modules[name]


def operands():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((13, 6), (31, 6)))
    labels = torch.randint(31, (13,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_has_torchs_loss_and_gradients(loaded, variant, compiled):
    layer = loaded[variant].layers.LinearCrossEntropy()
    layer = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    hidden, weight, labels = operands()
    expected = F.cross_entropy(hidden @ weight.T, labels)
    found = layer(hidden, weight, labels)
    torch.testing.assert_close(found, expected)
    ours, dense = (torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected))
    torch.testing.assert_close(ours, dense)


def test_the_head_adopts_weight_and_bias(loaded):
    hidden, _, labels = operands()
    head = torch.nn.Linear(6, 31)
    forward = loaded["torch-cpu"].layers.HeadCrossEntropy.forward
    torch.testing.assert_close(forward(head, hidden, labels), F.cross_entropy(head(hidden), labels))


def test_losses_have_their_names(loaded):
    kernel = loaded["torch-cpu"]
    hidden, weight, labels = operands()
    p = (hidden @ weight.T).log_softmax(-1)[labels >= 0].gather(1, labels[labels >= 0, None])[:, 0]
    expected = (-((1 - p.exp()) ** 2) * p).mean()
    torch.testing.assert_close(kernel.losses.get("focal:gamma=2")(hidden, kernel.Head(weight), labels), expected)


def test_the_folder_of_older_releases_has_the_same_names(repository, loaded):
    path = repository / "build" / "torch-cpu" / "hf_xent_ops" / "__init__.py"
    code = f"import runpy; print(*sorted(runpy.run_path({str(path)!r})['__all__']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == sorted(loaded["torch-cpu"].__all__), done.stderr


WITH_KERNELS = """
import os, sys
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
from kernels import LocalLayerRepository, Metadata, Mode, get_kernel, get_local_kernel, kernelize
from kernels import KernelizeFallback, use_kernel_forward_from_hub, use_kernel_mapping
from kernels._rust import Build, Digest, DigestAlgorithm

repository = Path(sys.argv[1])
Build.open(repository)
variant = repository / "build" / "torch-cpu"
found = Metadata.read_from_file(variant / "metadata.json")
found.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
kernel = get_local_kernel(repository)
os.environ["LOCAL_KERNELS"] = f"hf-xent/hf-xent-ops={repository}"
assert get_kernel("hf-xent/hf-xent-ops", version=0) is kernel and kernel.__name__ == found.id

@use_kernel_forward_from_hub("LinearCrossEntropy")
class Objective(nn.Module):
    def forward(self, hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight), labels)

@use_kernel_forward_from_hub("HeadCrossEntropy")
class Head(nn.Linear):
    def forward(self, hidden, labels):
        return F.cross_entropy(F.linear(hidden, self.weight, self.bias), labels)

model = nn.ModuleDict({"objective": Objective(), "head": Head(6, 31)})
hidden, labels = torch.randn(13, 6, requires_grad=True), torch.randint(31, (13,))

def losses():
    weight = model["head"].weight
    both = model["objective"](hidden, weight, labels), model["head"](hidden, labels)
    return *both, *torch.autograd.grad(sum(both), (hidden, weight))

expected = losses()
mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in kernel.layers.__dict__
           if name.endswith("CrossEntropy")}
with use_kernel_mapping(mapping, inherit_mapping=False):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=KernelizeFallback.NONE)
for module in model.values():
    assert module.forward.__func__.__module__ == f"{found.id}.layers"
for ours, dense in zip(losses(), expected):
    torch.testing.assert_close(ours, dense)
assert "hf_xent" not in sys.modules
print("loaded")
"""


@pytest.mark.skipif(
    not (KERNELS / "kernels").is_dir(), reason="kernels is not there: `make venv` puts it into .venv/kernels"
)
def test_kernels_loads_it_from_a_local_path(repository):
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITH_KERNELS, str(repository)]
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.stdout.strip() == "loaded", done.stderr
