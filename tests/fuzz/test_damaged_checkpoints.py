"""A slice of the damaged checkpoints, and each kind of thing in each file's place."""

import contextlib
import shutil

import pytest

from tests.fuzz.damaged_checkpoints import KINDS, Damage, Loader, fault, run

NAMES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja"),
    *("additional_chat_templates/default.jinja", "added_tokens.json", "special_tokens_map.json", "model.safetensors"),
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loader():
    with contextlib.closing(Loader()) as loader:
        yield loader


def test_damaged_checkpoints_are_refused_by_name_or_load(loader):
    assert run(loader, count=40, seed=1) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_by_name_and_never_opened(tmp_path, checkpoint, loader, kind):
    for name in NAMES:
        folder = shutil.copytree(checkpoint, tmp_path / name.replace("/", "-"))
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        KINDS[kind](path)
        loader.start()
        assert fault(folder, Damage(name, named=name, refused=True), loader.load(folder)) is None, name


def test_a_link_to_a_file_is_as_good_as_the_file(tmp_path, checkpoint, loader):
    folder = tmp_path / "links"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    loader.start()
    assert loader.load(folder)["outcome"] == "loaded"


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "added_tokens_file"])
def test_a_device_that_the_tokenizers_config_names_is_not_opened(tmp_path, checkpoint, loader, key):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = (folder / "tokenizer_config.json").read_text().rstrip().removesuffix("}")
    (folder / "tokenizer_config.json").write_text(f'{config}, "{key}": "/dev/zero"}}')
    loader.start()
    damage = Damage("a device", named="tokenizer_config.json", refused=True)
    assert fault(folder, damage, loader.load(folder)) is None
