"""The shape of the repository: imports go one way, the forward path reads nothing back, text says what it should."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qwen_batched"

# From low to high: a module imports from its own package, without circles, and from lines above its own.
ORDER = (
    ("arguments", "outputs"),
    ("runtime",),
    ("ops",),
    ("checkpoint",),
    ("families",),
    ("linear",),
    ("training",),
    ("inputs",),
    ("model",),
    ("generation",),
    ("calls",),
    ("qwen_batched_VL_model",),
    ("integrations",),
    ("adapters", "testing"),
    ("lora", "pictures", "transformers_reference"),
    ("profile",),
    ("deviation",),
    ("export",),
    ("extraction",),
    ("extract",),
)
# The yardstick and the checkpoints it reads are made without the code that they judge.
INDEPENDENT = ("testing", "transformers_reference")

MAX_LINES = 450


def module_name(path):
    """Dotted name below the package: "model.geometry", "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def rank(name):
    """The line of a module in ORDER; None for the package itself."""
    package = name.split(".")[0]
    return next((index for index, names in enumerate(ORDER) if package in names), None)


def imports_of(name):
    """The package's own modules that a module imports, wherever in the file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            # `from package import module` names a module, `from package.module import thing` does not.
            candidates = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [c for c in candidates if c.removeprefix("qwen_batched.") in SOURCES]
            found = known or [node.module]
        else:
            continue
        for imported in found:
            if imported == "qwen_batched":
                yield ""
            elif imported.startswith("qwen_batched."):
                yield imported.removeprefix("qwen_batched.")


def test_a_module_imports_from_lower_packages_only():
    for name in filter(None, SOURCES):
        own = rank(name)
        assert own is not None, f"{name} has no place in ORDER: give it one"
        for imported in imports_of(name):
            assert imported in SOURCES, f"{name} imports {imported}, which does not exist"
            assert imported or own > rank("qwen_batched_VL_model"), f"{name} imports its own package"
            is_fitting = not imported or rank(imported) < own or imported.split(".")[0] == name.split(".")[0]
            assert is_fitting, f"{name} imports {imported}, which is not below it"


def test_no_imports_go_in_circles():
    below = {name: set(imports_of(name)) - {name} for name in SOURCES if name}
    while ready := [name for name, imported in below.items() if not imported & below.keys()]:
        for name in ready:
            del below[name]
    assert sorted(below) == []


def test_every_package_in_the_order_exists():
    packages = {name.split(".")[0] for name in SOURCES if name}
    assert {name for names in ORDER for name in names} == packages


def test_only_one_place_waits_for_a_whole_device():
    """`runtime.arena.synchronize` does so in turn with captures, which would be lost otherwise."""
    waiting = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda.synchronize"
    ]
    assert waiting == ["runtime.arena"]


def test_ops_have_one_door():
    for name in SOURCES:
        if name.split(".")[0] == "ops":
            assert "ops" not in imports_of(name), f"{name} imports the door from inside"
            continue
        used = {i for i in imports_of(name) if i.startswith("ops.")}
        assert used <= {"ops.low_rank", "ops.segments"}, f"{name} goes past qwen_batched.ops: {used}"


def test_the_yardstick_uses_none_of_the_code_that_it_judges():
    for name in SOURCES:
        if (package := name.split(".")[0]) in INDEPENDENT:
            assert {imported.split(".")[0] for imported in imports_of(name)} <= {package}, name


# --- families ---

FAMILY_NAME = re.compile("qwen2|qwen3|llava", re.IGNORECASE)
MAY_NAME_FAMILIES = ("families", "integrations", "testing", "transformers_reference")


def names_and_strings(tree):
    """Identifiers, imported names and string constants, docstrings left out."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = None


@pytest.mark.slow
def test_no_module_of_all_families_names_one():
    for name, path in SOURCES.items():
        if name.split(".")[0] in MAY_NAME_FAMILIES or name.startswith("model.modeling_"):
            continue
        module = "model.modeling_qwen2_5_vl_batched"
        public = {module, f"qwen_batched.{module}"} if name == "" else set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert {found for found in names_and_strings(tree) if FAMILY_NAME.search(found)} == public, name


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from transformers import Qwen2Tokenizer", True),
        ("import a.llava", True),
        ("def f(x): return x.model_type == 'qwen3_vl'", True),
        ("def f(is_qwen2): pass", True),
        ("def f(): 'As in Qwen2-VL.'", False),
        ("x = 1  # Qwen2-VL", False),
    ],
)
def test_the_search_for_families_finds_one(code, found):
    assert any(map(FAMILY_NAME.search, names_and_strings(ast.parse(code)))) == found


# --- importing ---


@pytest.fixture(scope="module")
def imported():
    """What a new interpreter prints: as the package is imported, as its modules are used, and in the end."""
    code = """
import sys
for name in ("triton", "torchvision"):
    sys.modules[name] = None  # every import of it fails
import qwen_batched
print("torch" in sys.modules, hasattr(qwen_batched, "nothing"), hasattr(qwen_batched, "__nothing__"))
print(qwen_batched.qwen_batched_VL_model.QwenBatchedVL is qwen_batched.QwenBatchedVL, qwen_batched.ops.PILLOW)
import qwen_batched.testing, torch
from qwen_batched import *
heavy = ("skimage", "matplotlib", "pytest", "hypothesis")
print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-3:]


@pytest.mark.slow
def test_importing_needs_neither_triton_nor_torchvision_nor_libraries_for_tests_and_starts_no_cuda(imported):
    assert imported[2] == "[] False"


@pytest.mark.slow
def test_modules_are_attributes_of_the_package_and_are_imported_when_used(imported):
    assert imported[:2] == ["False False False", "True pillow"]


def test_the_contracts_import_paths_work():
    import qwen_batched
    from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder, BatchedVisionTransformer
    from qwen_batched.model.tensor_processor import TensorProcessor
    from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

    assert qwen_batched.QwenBatchedVL is QwenBatchedVL
    assert qwen_batched.TensorProcessor is TensorProcessor
    assert qwen_batched.BatchedDecoder is BatchedDecoder
    assert qwen_batched.BatchedVisionTransformer is BatchedVisionTransformer
    for part in (QwenBatchedVL, TensorProcessor, BatchedDecoder, BatchedVisionTransformer):
        assert callable(part.from_pretrained)


# --- no host reads ---

FORWARD_PACKAGES = {"runtime", "ops", "linear", "model", "training", "generation", "calls", "qwen_batched_VL_model"}
FORWARD_INPUTS = {
    "faults",
    "transformers_batch",
    "batch",
    "checks",
    "prepared",
    "prompt",
    "prompt_rows",
    "request",
    "sequence",
}
FORWARD_PATH = [
    name
    for name in SOURCES
    if (name.split(".")[0] in FORWARD_PACKAGES and name != "training.adapter_files")
    or name in {f"inputs.{part}" for part in FORWARD_INPUTS}
]
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
# (module, function, what): why it may.
ALLOWED_READS = {
    ("model.geometry", "resize_axis", "int"): "a table that is made once per size",
    ("inputs.prompt_rows", "lay_out", "tolist"): "a mask that is on the host",
    ("model.tensor_processor", "_mask_on_device", "tolist"): "a mask that is on the host",
    ("inputs.checks", "check_float_range", "float"): "frames that are on the host",
    ("inputs.faults", "refuse", "int"): "a batch that is on the host",
    ("inputs.transformers_batch", "read_grids", "tolist"): "sizes of images, at the price of a wait that callers name",
    ("inputs.transformers_batch", "read_transformers_batch", "int"): "a batch that is on the host",
    ("inputs.prepared", "_count", "int"): "a layout that is on the host",
    ("generation.arguments", "read_arguments", "tolist"): "end tokens that are a tensor, once in a generation",
    ("model.prompt_cache", "read_suffix", "int"): "ids that are on the host",
    ("model.client_methods", "get_rope_index", "tolist"): "tokens, for a method that nothing here calls",
    ("model.client_methods", "get_rope_index", "bool"): "the same",
    ("generation.loop", "rows", "tolist"): "new tokens that have reached the host",
}
CASTS = {"int", "float", "bool"}


def functions_of(tree):
    """Every function with the nodes that are its own, nested functions' left to themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            yield getattr(node, "name", "lambda"), list(own_nodes(node))


def own_nodes(function):
    body = function.body if isinstance(function.body, list) else [function.body]
    pending = list(body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def reads_of(nodes):
    """What in these nodes reads a tensor's values back, or may."""
    for node in nodes:
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in READS:
                yield called.attr
            if isinstance(called, ast.Name) and called.id in CASTS and looks_like_a_tensor(node.args):
                yield called.id
        if isinstance(node, ast.Subscript) and looks_like_a_mask(node.slice):
            yield f"[{ast.unparse(node.slice).strip('()')}]"


def looks_like_a_tensor(args):
    """Of a cast: not a call on the command line's kind of value, but on what indexing or a reduction returns."""
    return any(
        isinstance(arg, ast.Subscript) or (isinstance(arg, ast.Call) and isinstance(arg.func, ast.Attribute))
        for arg in args
    )


def looks_like_a_mask(index):
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    for part in parts:
        if isinstance(part, ast.Compare | ast.BoolOp) or (
            isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Invert | ast.Not)
        ):
            return True
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        if "mask" in name or name.startswith("is_"):
            return True
    return False


def test_no_value_is_read_back_on_the_forward_path_but_where_it_may_be():
    found = {
        (name, function, what)
        for name in FORWARD_PATH
        for function, nodes in functions_of(TREES[name])
        for what in reads_of(nodes)
    }
    assert found == set(ALLOWED_READS)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("def f(x): return x.sum().item()", "item"),
        ("def f(x): return torch.nonzero(x)", "nonzero"),
        ("def f(x): return x[x > 0]", "[x > 0]"),
        ("def f(x, mask): return x[:, ~mask]", "[:, ~mask]"),
        ("def f(x, camera_mask): return x[camera_mask]", "[camera_mask]"),
        ("def f(x): return bool(x.all())", "bool"),
        ("f = lambda x: x.cpu()", "cpu"),
    ],
)
def test_the_search_for_reads_finds_one(code, what):
    assert [what for _, nodes in functions_of(ast.parse(code)) for what in reads_of(nodes)] == [what]


# --- text ---

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "build", "dist", "shared", "venv"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".json", ".jinja", ".yml", ".yaml", ".cfg", ".typed", ""}
# Put together here, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of the machine it was written on": re.compile(
        r"(?<![\w.~])/(?:" + "|".join(["work", "root", "farm"]) + r")/"
    ),
    "a package registry's address": re.compile(
        "|".join(["py" + r"pi\.", "python" + "hosted", "download" + r"\.pytorch", "--(?:extra-)?" + "index" + "-url"])
    ),
}


def texts_of_the_repository():
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED_FOLDERS and not name.endswith(".egg-info") and (name == ".ci" or name[0] != ".")
        ]
        for name in names:
            path = Path(folder, name)
            if path.suffix in TEXT_SUFFIXES and name not in {".git"}:
                yield path


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds_what_belongs_to_one_machine(what):
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts_of_the_repository()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == []


def test_the_search_looks_at_the_repository():
    found = {str(path.relative_to(ROOT)) for path in texts_of_the_repository()}
    assert {"README.md", "pyproject.toml", "qwen_batched/checkpoint/config.py", "tests/conftest.py", ".ci/run"} <= found
    assert FORBIDDEN["a path of the machine it was written on"].search('open("/ro' + 'ot/x")')
    assert FORBIDDEN["a package registry's address"].search("https://py" + "pi.org/simple")


def test_every_module_and_everything_public_in_it_has_a_docstring():
    for name, tree in TREES.items():
        missing = [] if ast.get_docstring(tree) else ["the module"]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                missing += [] if ast.get_docstring(node) else [node.name]
        assert missing == [], name


@pytest.mark.parametrize("name", ["BatchedDecoder", "BatchedVisionTransformer", "QwenBatchedVL", "TensorProcessor"])
def test_every_public_method_of_what_is_exported_has_a_docstring(name):
    import qwen_batched

    exported = getattr(qwen_batched, name)
    own = [kind for kind in exported.__mro__ if kind.__module__.startswith("qwen_batched.")]
    public = {name: value for kind in reversed(own) for name, value in vars(kind).items() if not name.startswith("_")}
    assert "forward" in public or name == "TensorProcessor"
    assert [attribute for attribute, value in public.items() if not getattr(value, "__doc__", None)] == []


def test_every_file_is_short_enough_to_read():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


# --- traps ---


def test_traps_are_numbered_in_one_spelling_and_each_names_a_test_that_is_there():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))
    spelled = set(re.findall(r"(?i)\btraps?[ _-]?[0-9]+|_trap_?[0-9]+", tests))
    assert {spelling for spelling in spelled if not re.fullmatch(r"_trap[0-9]{2}|trap [0-9]{2}", spelling)} == set()
    listed = re.findall(r"(?ms)^- \*\*([0-9]{2})\..*?`(test_\w+)`", (ROOT / "docs" / "traps.md").read_text("utf-8"))
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    assert {spelling[-2:] for spelling in spelled} <= {number for number, _ in listed}, "docs/traps.md lacks it"
    functions = set(re.findall(r"def (test_\w+)", tests))
    assert [name for _, name in listed if name not in functions] == [], "docs/traps.md names a test that is gone"


def test_traps_of_sister_families_are_all_listed_and_there():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))
    traps = r"test_trap_(?:all|qwen[0-9])_\w+"
    assert set(re.findall(f"def ({traps})", tests)) == set(
        re.findall(traps, (ROOT / "docs/traps.md").read_text("utf-8"))
    )
