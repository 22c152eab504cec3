"""The names of PyTorch, Triton and peft that are not public and that the package uses all the same: what each is for.

A new version of a library may drop or change them without a word. Where a test here fails, look for a public way first.
"""

import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

PACKAGE = Path(__file__).resolve().parents[1] / "qwen_batched"
LIBRARIES = ("torch", "triton", "peft", "transformers", "accelerate", "safetensors", "huggingface_hub")

# Imported, or reached from the library's name.
NAMES = {
    "torch.nn.modules.module._global_forward_hooks": "hooks for all modules: fast paths must not pass them by",
    "torch.nn.modules.module._global_forward_pre_hooks": "the same",
    "torch.nn.modules.module._global_backward_hooks": "the same",
    "torch.nn.modules.module._global_backward_pre_hooks": "the same",
    "torch._C._get_tracing_state": "torch.jit.trace needs operations that go through the dispatcher",
    "torch._C._cuda_endAllocateToPool": "ends the recording to a graph pool that an invalidated capture leaves on",
    "torch._C._cuda_getDevice": "the current device of every launch, without torch.cuda's checks",
    "torch._C._cuda_getCurrentRawStream": "the current stream of every launch, as Triton asks for it",
    "triton.backends.nvidia.driver": "whether Triton's C launcher takes the arguments that launches here give it",
    "torch._C._are_functorch_transforms_active": "vmap and grad need operations that go through the dispatcher",
    "torch._C._functorch.maybe_current_level": "the same, and a CUDA graph can be neither captured nor replayed there",
    "torch._C._functorch.peek_interpreter_stack": "whether a cached table would be made inside a transform",
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": "makes a cached table outside of transforms",
    "torch._C._len_torch_dispatch_stack": "modes that watch operations: with one, they go through the dispatcher",
    "torch._ops._len_torch_dispatch_stack_pre_dispatch": "the same, of modes that torch.export uses",
    "torch.utils._pytree": "batches and requests as trees of tensors, which graphs, compilers and exports take apart",
    "torch.utils._python_dispatch._disable_current_modes": "makes a cached table of real tensors under a fake mode",
    "torch._C.DisableTorchFunction": "makes a cached table where it belongs, whatever the default device",
    "torch._subclasses.fake_tensor.FakeTensor": "inputs without values are refused, unless something is being traced",
    "torch.ops.aten._scaled_dot_product_cudnn_attention": "cuDNN's attention for the shapes where it is the fastest",
    "torch._addmm_activation": "a product, its bias and a tanh GELU in one kernel of cuBLAS",
    "triton.compiler.CompiledKernel": "a compiled kernel is kept, and launched without Triton's search for it",
    "triton.runtime.jit.KernelInterface": "the type of what is launched",
    "triton.language.extra.cuda.gdc_wait": "programmatic dependent launch: a kernel starts before its forerunner ends",
    "triton.language.extra.cuda.gdc_launch_dependents": "the same, in the forerunner",
    "torch._inductor.cpu_vec_isa.pick_vec_isa": "what takes the compiler long to find out, before that folder",
    "torch._inductor.utils.fresh_inductor_cache": "a folder of the compiler's own for each package, removed after it",
    "torch._inductor": "AOTInductor, by documented names: aoti_compile_and_package, list_options",
    "torch._C._aoti.AOTIModelPackageLoader": "that of C++; aoti_load_package compiles programs before it",
}
# Attributes of a library's objects.
ATTRIBUTES = {
    "_parameters": "an nn.Module's, read without __getattr__, which takes the host a microsecond each time",
    "_buffers": "the same",
    "_modules": "the same",
    "_forward_hooks": "a module with hooks must be called, not passed by",
    "_forward_pre_hooks": "the same",
    "_backward_hooks": "the same",
    "_backward_pre_hooks": "the same",
    "_compiled_call_impl": "a module that was compiled in place must be called too",
    "_load_state_dict_post_hooks": "a module that changes what is loaded is loaded by its own code",
    "_apply": "overridden: packed weights are undone before parameters move, and packed anew after",
    "_load_from_state_dict": "overridden: a tied head may be in a state dict or not",
    "_save_to_state_dict": "overridden: a packed weight is made contiguous before it is saved",
    "_current_level": "torch.autograd.forward_ad's: -1 outside of forward-mode derivatives, which no kernel has",
    "_BASE_ARGS_FORMAT": "triton.backends.nvidia.driver's: the arguments of Triton's C launcher",
    "_adapters": "peft's: the adapters of a layer of trained tokens",
}
# Public in spelling only: what peft's LoRA layer holds, which is computed without it where it is plain.
LORA_LAYER = (
    *("base_layer", "lora_A", "lora_B", "scaling", "lora_dropout", "use_dora", "lora_variant"),
    *("active_adapters", "merged_adapters", "disable_adapters", "cast_input_dtype_enabled"),
)
DOCUMENTED = {"_replace", "_asdict", "_fields"}  # of named tuples

# Of Triton, `triton` and `triton.language` are public.
INTERNAL_MODULES = ("triton.compiler", "triton.runtime", "triton.language.extra", "triton.backends")


def is_private(part):
    return part.startswith("_") and not part.startswith("__")


def dotted(node):
    """`a.b.c` of nested attributes; None where they do not begin at a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


@functools.cache
def nodes():
    """Of the syntax trees of all modules."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    return [node for tree in trees for node in ast.walk(tree)]


def used_names():
    """Names of libraries with a private part."""
    inner = {id(node.value) for node in nodes() if isinstance(node, ast.Attribute)}
    for node in nodes():
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LIBRARIES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            names = [dotted(node)]
        else:
            continue
        for name in filter(None, names):
            if name.split(".")[0] in LIBRARIES and (
                any(map(is_private, name.split("."))) or name.startswith(INTERNAL_MODULES)
            ):
                yield ".".join(part for part in name.split(".") if not part.startswith("__"))


def used_attributes():
    """Private attributes that the package does not define itself, or that `nn.Module` has too."""
    own = {node.name for node in nodes() if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in nodes():
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.id if isinstance(node, ast.Name) else node.attr)
    own -= set(dir(nn.Module()))
    for node in nodes():
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own and (dotted(node) or "").split(".")[0] not in LIBRARIES:
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and is_private(name) and name not in own:
                yield name


@pytest.mark.parametrize(
    ("used", "table"), [(used_names, NAMES), (used_attributes, ATTRIBUTES)], ids=["names", "attributes"]
)
def test_the_tables_hold_just_what_the_package_uses(used, table):
    used = set(used()) - DOCUMENTED
    assert used - table.keys() == set(), "not public: take a public way, or add to the table what it is needed for"
    assert table.keys() - used == set(), "no longer used: take out of the table"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there(name):
    if "_cuda_" in name and torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    found, *parts = name.split(".")
    pytest.importorskip(found, reason=f"needs {found}")
    found = importlib.import_module(found)
    for part in parts:
        path = f"{getattr(found, '__name__', '')}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            if path.startswith("triton.language.extra") and part.startswith("gdc_"):
                pytest.skip("Triton before programmatic dependent launch, which the package does without")
            found = importlib.import_module(path)


def test_the_attributes_of_a_module_are_there():
    others = {"_adapters", "_current_level", "_BASE_ARGS_FORMAT"}  # not a module's
    assert {name for name in ATTRIBUTES if not hasattr(nn.Module(), name)} == others
    assert forward_ad._current_level == -1


def test_the_attributes_of_a_lora_layer_are_there_and_used():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    (layer,) = (module for module in wrapped.modules() if type(module) is peft.tuners.lora.layer.Linear)
    since_later_versions = {"lora_variant", "cast_input_dtype_enabled"}
    assert {name for name in LORA_LAYER if not hasattr(layer, name)} <= since_later_versions
    attributes = {node.attr for node in nodes() if isinstance(node, ast.Attribute)}
    strings = {node.value for node in nodes() if isinstance(node, ast.Constant)}
    assert [name for name in LORA_LAYER if name not in attributes | strings] == []
