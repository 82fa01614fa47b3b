"""Names of other libraries that the package leans on and nobody promised: a failure says which release changed what.

API has a line for each name that can be imported: the rooms that use it, and the parameters it must take. HELD has a
line for each that only an object has. A name that the package uses and neither has is a failure, too.
"""

import argparse
import ast
import functools
import importlib
import inspect
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn

import hf_xent
from hf_xent import trainers
from support.models import tiny

PACKAGE = Path(hf_xent.__file__).parent
TRAINER, DPO, SFT = "transformers.Trainer", "trl.DPOTrainer", "trl.SFTTrainer"
DISTILLATION = "trl.DistillationTrainer"

API = {
    # torch: what a backward knows of its graph, other ways to differentiate, and tensors that are wrapped
    "torch._C._autograd._get_current_graph_task_keep_graph": ("ops", ()),
    "torch._C._are_functorch_transforms_active": ("ops", ()),
    "torch._C._functorch.is_legacy_batchedtensor": ("ops", ()),
    "torch._C._functorch.is_batchedtensor": ("ops", ()),
    "torch._C._autograd._top_saved_tensors_default_hooks": ("lazy", ()),
    "torch._C._nn._parse_to": ("lazy", ()),
    "torch._C.DisableTorchFunctionSubclass": ("lazy", ()),
    "torch.Tensor._make_wrapper_subclass": ("lazy", ()),
    "torch.Tensor._backward_hooks": ("lazy", ()),
    "torch.Tensor._version": ("lazy", ()),
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "trainers", ("module", "params_and_buffers_to_ignore"),
    ),
    "torch.utils._pytree.tree_map": ("lazy", ("func", "tree")),
    "torch.utils._pytree.tree_leaves": ("lazy", ("tree",)),
    "torch.overrides.get_default_nowrap_functions": ("lazy", ()),
    "torch.nn.Module._apply": ("ln_free", ("fn", "recurse")),
    "torch.nn.Module._load_from_state_dict": ("ln_free", ("state_dict", "prefix")),
    "torch.nn.Module._replicate_for_data_parallel": ("patching", ()),
    "torch.nn.Module._compiled_call_impl": ("trainers, patching", ()),
    "torch.nn.Module._call_impl": ("patching", ()),
    # triton
    "triton.runtime.JITFunction": ("ops", ()),
    # transformers: how a model finds its loss, and what our trainers override or read
    "transformers.PreTrainedModel.loss_function": ("patching", ()),
    "transformers.loss.loss_utils.ForMaskedLMLoss": ("patching", ("logits", "labels", "vocab_size")),
    "transformers.PreTrainedModel._keys_to_ignore_on_save": ("trainers", ()),
    "transformers.PreTrainedModel._is_stateful": ("generation", ()),
    "transformers.GenerationMixin._prefill": ("generation", ("input_ids", "generation_config", "model_kwargs")),
    "transformers.GenerationMixin._update_model_kwargs_for_generation": (
        "generation", ("outputs", "model_kwargs", "is_encoder_decoder"),
    ),
    "transformers.PreTrainedConfig.get_config_dict": ("ln_free", ("pretrained_model_name_or_path",)),
    "transformers.PreTrainedConfig._attn_implementation": ("ln_free, attention", ()),
    "transformers.PreTrainedModel._supports_attention_backend": ("attention", ()),
    "transformers.PreTrainedModel._auto_class": ("hub", ()),
    "transformers.AttentionInterface._global_mapping": ("attention", ()),
    "transformers.AttentionMaskInterface._global_mapping": ("attention", ()),
    "transformers.masking_utils.sdpa_mask": (
        "attention", ("q_length", "kv_length", "q_offset", "kv_offset", "attention_mask", "allow_is_causal_skip"),
    ),
    "transformers.masking_utils.flex_attention_mask": (
        "attention", ("q_length", "kv_length", "q_offset", "kv_offset", "attention_mask", "mask_function"),
    ),
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": ("attention", ()),
    "transformers.models.llama.modeling_llama.eager_attention_forward": ("attention", ("module", "attention_mask")),
    "transformers.AutoModelForCausalLM._model_mapping": ("ln_free", ()),
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING": ("ln_free", ()),
    "transformers.pytorch_utils.Conv1D": ("ln_free", ("nf", "nx")),
    "transformers.utils.logging.tqdm": ("trainers, generation", ()),
    f"{TRAINER}._get_train_sampler": ("trainers", ("train_dataset",)),
    f"{TRAINER}._save_optimizer_and_scheduler": ("trainers", ("output_dir",)),
    f"{TRAINER}._load_optimizer_and_scheduler": ("trainers", ("checkpoint",)),
    f"{TRAINER}._get_num_items_in_batch": ("trainers", ("batch_samples", "device")),
    f"{TRAINER}._set_signature_columns_if_needed": ("trainers", ()),
    "transformers.Wav2Vec2ForCTC._get_feat_extract_output_lengths": ("trainers", ("input_lengths",)),
    "transformers.ParakeetForCTC._get_subsampling_output_length": ("trainers", ("input_lengths",)),
    f"{TRAINER}._determine_best_metric": ("trainers", ("metrics", "trial")),
    f"{TRAINER}._prepare_inputs": ("trainers", ("inputs",)),
    f"{TRAINER}._save": ("trainers", ("output_dir", "state_dict")),
    f"{TRAINER}._load_from_checkpoint": ("trainers", ("resume_from_checkpoint",)),
    f"{TRAINER}._load_best_model": ("trainers", ()),
    f"{TRAINER}.save_model": ("trainers", ("output_dir", "_internal_call")),
    # trl: what our trainers override, the forward it puts on a model, its kernel in the benchmark
    f"{DPO}._prepare_dataset": ("trainers", ("dataset", "processing_class", "args", "dataset_name")),
    f"{SFT}._prepare_dataset": (
        "trainers, teachers", ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")
    ),
    f"{SFT}._reject_skip_prepare_without_labels": ("trainers", ("datasets", "data_collator")),
    f"{DPO}._precompute_ref_logps": ("trainers", ("dataset", "name", "batch_size")),
    f"{DPO}._set_signature_columns_if_needed": ("trainers", ()),
    f"{DISTILLATION}._compute_loss": ("trainers", ("unwrapped_student", "inputs", "num_items_in_batch")),
    f"{DPO}._compute_loss": ("trainers", ("model", "inputs", "return_outputs")),
    f"{DPO}.compute_ref_log_probs": ("trainers", ("model", "inputs")),
    f"{DPO}._name": ("trainers", ()),
    f"{DPO}._tag_names": ("trainers", ()),
    "trl.trainer.utils.add_fused_lm_head": ("patching", ("model", "outputs", "temperature", "cast_lm_head_to_fp32")),
    "trl.trainer.utils.FusedCausalLMOutput": ("patching", ("loss", "log_probs", "label_mask", "aux_loss")),
    "trl.trainer.utils.use_adapter": ("trainers", ("model", "adapter_name")),
    "trl.models.prepare_deepspeed": ("teachers", ("model", "accelerator")),
    "trl.models.unwrap_model_for_generation": ("trainers", ("model", "accelerator")),
    "trl.kernels.ChunkedLogProbFunction": ("bench", ()),
    # huggingface_hub, evaluate
    "huggingface_hub.utils.sha.git_hash": ("hub", ("data",)),
    "huggingface_hub.utils.sha.sha_fileobj": ("hub", ("fileobj",)),
    "huggingface_hub.utils.yaml_dump": ("hub", ()),
    "huggingface_hub.utils.validate_repo_id": ("hub", ("repo_id",)),
    "evaluate.Metric._info": ("metrics", ()),
    "evaluate.Metric._compute": ("metrics", ("predictions", "references")),
}  # fmt: skip
"""Name -> rooms that use it, parameters."""


OF_TRL_1_16 = {
    f"{DISTILLATION}._compute_loss",
    "trl: DistillationTrainer._forward_redirection",
    f"{SFT}._reject_skip_prepare_without_labels",
    "trl.kernels.ChunkedLogProbFunction",
    "trl.trainer.utils.FusedCausalLMOutput",
    "trl.trainer.utils.add_fused_lm_head",
    "trl: what is within add_fused_lm_head",
    "trl: GRPOTrainer's forward of a float32 head",
}
"""What older versions of TRL do without, and the package with them."""


def check_version(name):
    if name in OF_TRL_1_16 and Version(version("trl")) < Version("1.16"):
        pytest.skip("new in TRL 1.16")


@pytest.mark.parametrize("name", API)
def test_a_name_that_nobody_promised(name):
    check_version(name)
    used, parameters = API[name]
    api = resolved(name)
    missing = set(parameters) - set(inspect.signature(api).parameters if parameters else ())
    takes_any = parameters and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(api).parameters.values())
    assert not missing or takes_any, f"{name} of {used} does not take {', '.join(sorted(missing))}"


def resolved(name):
    """What a dotted name leads to; an attribute of a class may be a descriptor or None."""
    module, _, rest = name, "", ""
    while module:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
    for part in filter(None, rest.split(".")):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found


def dispatched():
    """What a wrapper subclass's `__torch_dispatch__` is given."""
    return torch.ops.aten.detach.default


@functools.cache
def hooked():
    """A linear layer under a hook of accelerate."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(nn.Linear(2, 2), ModelHook())


def aligned():
    """The hook that moves a layer's weights and input to a device."""
    from accelerate.hooks import AlignDevicesHook

    return AlignDevicesHook(offload=False)


@functools.cache
def lora():
    """The head of a model with an adapter on it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["lm_head"]))
    return model.get_base_model().get_output_embeddings()


@functools.cache
def kept():
    """A model with a loss of the user's."""
    model = tiny()
    type(model).loss_function.fset(model, nn.Identity())  # an assignment of a module would not get to the property
    return model


@functools.cache
def fused():
    """What the forward closes over that TRL's trainers put on a model."""
    from trl.trainer.utils import add_fused_lm_head

    model = tiny()
    add_fused_lm_head(model)
    forward = model.__dict__["forward"]
    function = getattr(forward, "__func__", forward)
    assert function.__code__.co_qualname.startswith("add_fused_lm_head.")
    return inspect.getclosurevars(function).nonlocals


def passed():
    """A tensor that an autograd function has returned."""

    class Pass(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return Pass.apply(torch.zeros(1, requires_grad=True))


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode


@functools.cache
def rows():
    from datasets import Dataset

    return Dataset.from_dict({"text": ["a"]})


def says(text, package, pattern):
    """Whether a file of a library has a text; the library is not imported."""
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    files = list(Path(spec.submodule_search_locations[0]).glob(pattern))
    assert files, pattern
    return any(text in path.read_text(encoding="utf-8") for path in files)


HELD = {
    "torch: nn.Module._parameters": ("ln_free", lambda: nn.Linear(1, 1)._parameters["weight"]),
    "torch: nn.Module._buffers": ("patching", lambda: nn.BatchNorm1d(1)._buffers["running_mean"]),
    "torch: nn.Module._modules": ("patching", lambda: nn.Sequential(nn.ReLU())._modules["0"]),
    "torch: nn.Module._forward_pre_hooks": ("patching", lambda: nn.Linear(1, 1)._forward_pre_hooks == {}),
    "torch: nn.Module._forward_hooks": ("patching", lambda: nn.Linear(1, 1)._forward_hooks == {}),
    "torch: nn.Module._backward_pre_hooks": ("patching", lambda: nn.Linear(1, 1)._backward_pre_hooks == {}),
    "torch: nn.Module._backward_hooks": ("patching", lambda: nn.Linear(1, 1)._backward_hooks == {}),
    "torch: grad_fn._forward_cls": ("lazy", lambda: passed().grad_fn._forward_cls.__module__ == __name__),
    "torch: compile()._orig_mod": ("patching", lambda: says("self._orig_mod", "torch", "_dynamo/eval_frame.py")),
    "torch: FSDP._fsdp_wrapped_module": (
        "patching",
        lambda: says("_fsdp_wrapped_module", "torch", "distributed/fsdp/fully_sharded_data_parallel.py"),
    ),
    "torch: storage._cdata": ("lazy", lambda: isinstance(torch.zeros(1).untyped_storage()._cdata, int)),
    "torch: aten._local_scalar_dense": (
        "planning",
        lambda: torch.ops.aten._local_scalar_dense.default(torch.ones(())) == 1,
    ),
    "torch: FakeTensorMode": ("planning", lambda: callable(fake_mode())),
    "Python: ArgumentParser._actions": ("recipes, cli", lambda: argparse.ArgumentParser()._actions[0].dest == "help"),
    "transformers: the _runtime of an evaluation": (
        "dashboard",
        lambda: says('f"{split}_runtime"', "transformers", "trainer_utils.py"),
    ),
    "torch: OpOverload._schema": ("lazy", lambda: dispatched()._schema.arguments[0].alias_info is not None),
    "transformers: model._loss_function": ("patching", lambda: kept()._modules["_loss_function"]),
    "transformers: the property loss_function": ("patching", lambda: callable(type(kept()).loss_function.fset)),
    "transformers: GenerationConfig._pad_token_tensor": (
        "generation",
        lambda: says("generation_config._pad_token_tensor = pad_token_tensor", "transformers", "generation/utils.py"),
    ),
    "transformers: model._reorder_cache": (
        "generation",
        lambda: says('hasattr(self, "_reorder_cache")', "transformers", "generation/utils.py"),
    ),
    "transformers: config._name_or_path": ("hub", lambda: isinstance(tiny().config._name_or_path, str)),
    "transformers: Trainer._signature_columns": (
        "trainers",
        lambda: says("_signature_columns", "transformers", "trainer.py"),
    ),
    "transformers: Trainer._train_batch_size": (
        "trainers, cem",
        lambda: says("self._train_batch_size", "transformers", "trainer.py"),
    ),
    "trl: DistillationTrainer._forward_redirection": (
        "trainers",
        lambda: says("self._forward_redirection(", "trl", "trainer/distillation_trainer.py"),
    ),
    "trl: DPOTrainer._metrics": ("trainers", lambda: says("self._metrics = {", "trl", "trainer/dpo_trainer.py")),
    "trl: KTO's _stored_metrics": (
        "trainers",
        lambda: says("_stored_metrics", "trl", "experimental/**/*_trainer.py"),
    ),
    "trl: what is within add_fused_lm_head": (
        "patching",
        lambda: {"temperature", "outputs", "cast_lm_head_to_fp32", "original_forward"} <= {*fused()},
    ),
    "trl: GRPOTrainer's forward of a float32 head": (
        "patching",
        lambda: (
            says("def cast_forward_to_fp32(hidden_states):", "trl", "trainer/grpo_trainer.py")
            and says("def _cast_lm_head_to_fp32(", "trl", "trainer/grpo_trainer.py")
        ),
    ),
    "accelerate: hook.offload": ("patching", lambda: aligned().offload is False),
    "accelerate: module._hf_hook": ("patching", lambda: hooked()._hf_hook),
    "accelerate: module._old_forward": ("patching", lambda: callable(hooked().__dict__["_old_forward"])),
    "accelerate: model._original_forward": (
        "models",
        lambda: says("model._original_forward = model.forward", "accelerate", "accelerator.py"),
    ),
    "peft: LoRA's base_layer": ("patching", lambda: isinstance(lora().base_layer, nn.Linear)),
    "peft: active_adapters": ("patching", lambda: [*lora().active_adapters] == ["default"]),
    "bitsandbytes: Params4bit.quant_state": (
        "patching",
        lambda: says("self.quant_state", "bitsandbytes", "nn/modules.py"),
    ),
    "bitsandbytes: QuantState.state2": ("patching", lambda: says("self.state2 = ", "bitsandbytes", "functional.py")),
    "bitsandbytes: QuantState.nested": ("patching", lambda: says("self.nested = ", "bitsandbytes", "functional.py")),
    "bitsandbytes: QuantState.packing_format_for_cpu": (
        "patching",
        lambda: says("packing_format_for_cpu", "bitsandbytes", "nn/modules.py"),
    ),
    "bitsandbytes: Linear4bit.compute_type_is_set": (
        "patching",
        lambda: says("self.compute_type_is_set", "bitsandbytes", "nn/modules.py"),
    ),
    "bitsandbytes: Int8Params.SCB": ("patching", lambda: says("obj.SCB = SCB", "bitsandbytes", "nn/modules.py")),
    "torchao: Int8Tensor.act_quant_kwargs": (
        "patching",
        lambda: says("act_quant_kwargs", "torchao", "quantization/quantize_/workflows/int8/int8_tensor.py"),
    ),
    "torchao: Int8Tensor.tensor_data_names": (
        "patching",
        lambda: says("tensor_data_names", "torchao", "quantization/quantize_/workflows/int8/int8_tensor.py"),
    ),
    "datasets: Dataset._fingerprint": ("data", lambda: isinstance(rows()._fingerprint, str)),
    "deepspeed: an autograd function around outputs, in its own module": (
        "lazy",
        lambda: says("class PreBackwardFunctionForModule(", "deepspeed", "runtime/zero/parameter_offload.py"),
    ),
    "deepspeed: parameter.ds_id": (
        "patching",
        lambda: says("ds_id", "deepspeed", "runtime/zero/partition_parameters.py"),
    ),
}
"""Library and name -> rooms that use it, what shows that it is there."""


@pytest.mark.parametrize("name", HELD)
def test_an_attribute_that_nobody_promised(name):
    check_version(name)
    used, shown = HELD[name]
    try:
        value = shown()
    except (AttributeError, KeyError) as error:
        pytest.fail(f"{name} of {used} is not there: {error!r}")
    assert value is not None and value is not False, f"{name} of {used}"


def test_a_graph_that_is_kept_and_nothing_else_is_under_way():
    """The answers of torch's private questions where nothing special goes on."""
    assert torch._C._autograd._get_current_graph_task_keep_graph() is True
    assert torch._C._are_functorch_transforms_active() is False
    assert torch._C._functorch.is_legacy_batchedtensor(torch.zeros(())) is False
    assert torch._C._functorch.is_batchedtensor(torch.zeros(())) is False
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize("name", [*API, *HELD])
def test_what_is_listed_is_used(name):
    """If this fails: the package needs the name no longer, or another room needs it now."""
    rooms = (API | HELD)[name][0].split(", ")
    last = re.findall(r"\w+", name)[-1]
    for room in rooms:
        assert any(last in path.read_text(encoding="utf-8") for path in (PACKAGE / room).rglob("*.py")), room


def words(text):
    return set(re.findall(r"\b_[a-z]\w+", text))


KNOWN = words(" ".join((*API, *HELD)))


def test_every_private_name_is_listed():
    """Private attributes in the package's code that no file of the package defines."""
    used, ours = {}, set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            for name in names:
                if re.fullmatch(r"_[a-z]\w+", name):
                    used.setdefault(name, path.relative_to(PACKAGE).as_posix())
            ours |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
            ours |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
            ours |= {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) else set()
    texts = {
        "_accuracy",
        "_hf_xent",
        "_kwargs",
        "_pairs",
        "_score",
    }  # where a model keeps its patch; ends of names, a folder
    python = {"_getframe", "_replace"}  # the standard library's
    unlisted = {name: file for name, file in used.items() if name not in KNOWN | ours | texts | python}
    assert not unlisted


@pytest.mark.parametrize("name", [name for name in trainers.__all__ if name.endswith("Trainer")])
def test_every_override_is_listed(name):
    """Private methods and attributes of transformers' and TRL's trainers that a trainer of ours has, too."""
    ours = [kind for kind in getattr(trainers, name).__mro__ if kind.__module__.startswith("hf_xent")]
    theirs = [kind for kind in getattr(trainers, name).__mro__ if not kind.__module__.startswith("hf_xent")]
    private = {key for kind in ours for key in vars(kind) if re.match(r"_[a-z]", key)}
    assert {key for key in private if any(key in vars(kind) for kind in theirs)} - KNOWN == set()
