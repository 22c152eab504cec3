"""README and docs: their Python runs, their links lead somewhere, and the API page says what the code has."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.test_structure import ORDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)  # with a word behind "python": not to be run


def runnable_blocks(page):
    """The code of each block, at its own line of the page, so that a traceback shows the page's lines."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


@pytest.mark.parametrize("page", [page for page in PAGES if any(runnable_blocks(page))], ids=lambda page: page.name)
def test_every_block_of_python_runs_offline(page, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for index, size in enumerate([(84, 56), (56, 84), (84, 56)]):
        Image.new("RGB", size, "blue").save(tmp_path / "photos" / f"{index}.jpg")
    namespace = {"__name__": page.stem}
    for code in runnable_blocks(page):
        exec(compile(code.replace(MODEL, str(checkpoint)), page, "exec"), namespace)


# --- the API page ---

# What users may import; the rest of the package may change at any time.
PUBLIC = (
    *("qwen_batched", "qwen_batched.lora", "qwen_batched.pictures"),
    *("qwen_batched.adapters.lerobot", "qwen_batched.integrations.starvla"),
    *("qwen_batched.integrations.still_images", "qwen_batched.export", "qwen_batched.export.run_onnx"),
    *("qwen_batched.extraction", "qwen_batched.testing"),
)


def public_names(module):
    """What a module defines or lists in `__all__`, without underscores."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def shown_signature(function):
    """As the page shows it: names and defaults, no annotations and no `self`."""
    signature = inspect.signature(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def entries(name, value):
    """The lines of the page, up to their explanations, for a public name: a class has one for each of its members."""
    if not callable(value) or (inspect.isclass(value) and value.__name__ != name):  # the latter is another's name
        yield f"`{name}`"
        return
    yield f"`{name}{shown_signature(value)}`"
    if not inspect.isclass(value):
        return
    for owner in reversed(value.__mro__):
        if not owner.__module__.startswith("qwen_batched"):
            continue
        for member, raw in vars(owner).items():
            found = getattr(value, member)
            if member.startswith("_") and member != "__call__":
                continue
            if isinstance(raw, property):
                yield f"`{name}.{member}`"
            elif callable(found):
                yield f"`{name}.{member}{shown_signature(found)}`"


@pytest.mark.parametrize("module", PUBLIC)
def test_the_api_page_has_every_public_name_with_its_true_signature(module):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {module}\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^- (`[^`]+`)(?=: \S)", section, re.MULTILINE)
    assert len(shown) == len(set(shown))
    imported = importlib.import_module(module)
    true = {line for name in public_names(imported) for line in entries(name, getattr(imported, name))}
    assert (true - set(shown), set(shown) - true) == (set(), set()), "missing on the page, and untrue there"


def test_the_api_page_has_no_other_sections():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (qwen_batched\S*)$", text, re.MULTILINE)) == PUBLIC


# --- links, order ---


def anchors(page):
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    broken = []
    for target in targets:
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
            broken.append(target)
    assert broken == []


def test_the_contributors_page_shows_the_import_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text.partition("## Import order")[2].split("```")[1].split("\n")[1:-1]
    assert shown == [", ".join(names) for names in ORDER]


def test_the_first_screen_of_the_readme_says_what_it_is_what_it_needs_and_how_to_run_it():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:50])
    links = {f"(docs/{page.name})" for page in PAGES if page.parent != ROOT} - {"(docs/traps.md)"}
    for part in (
        "<img",
        "made-up weights",
        "| **",
        "**Models**",
        "**Needs**",
        "pip install",
        "from_pretrained",
        *links,
    ):
        assert part in first, part
