"""Kills saves over a checkpoint at random moments.

    python -m tests.fuzz.kill_while_saving --count 50 --seed 0

After each, a process that has seen nothing of it reads the folder: it must be the old checkpoint or the new one, file
by file, with nothing of the save left, to us and to transformers. The saves go over folders of every layout: one file,
shards and an index, links, foreign and contradicting files; on file systems with and without hard links.
`kill_at_every_step` kills the mechanism alone, at each of its steps, and lets it find the disk full.
"""

import argparse
import functools
import hashlib
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import huggingface_hub
import torch
import transformers

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from tests.fuzz.interrupted import files, in_a_child, result, save_failing

FOREIGN = {"README.md": b"# mine", "optimizer.pt": b"\0" * 64, "checkpoint-5": None, "training_args.bin": b"1"}
# Each says something that the new checkpoint does not.
CONTRADICTING = {
    "chat_template.jinja": b"another {{ messages[0]['content'] }}",
    "additional_chat_templates": None,
    "added_tokens.json": b'{"<old>": 999}',
    "processor_config.json": b'{"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 7840}}}',
    "pytorch_model.bin": b"a pickle",
}
LAYOUTS = ("single", "sharded", "links", "crowded")


def prepare(folder: Path, layout: str) -> None:
    """Puts the old checkpoint into a fresh folder."""
    behind = folder.with_name("behind")
    for path in (folder, behind):
        shutil.rmtree(path, ignore_errors=True)
    write_checkpoint(folder, seed=2, shards=3 if layout in ("sharded", "crowded") else None, key_layout="nested")
    if layout == "links":
        folder.rename(behind)
        folder.mkdir()
        for path in behind.iterdir():
            (folder / path.name).symlink_to(Path("..", behind.name, path.name))
    others = {} if layout == "single" else FOREIGN | (CONTRADICTING if layout == "crowded" else {})
    for name, content in others.items():
        if content is None:
            (folder / name).mkdir()
        (folder / name if content else folder / name / "tool.jinja").write_bytes(content or b"of a folder")


def save(model: QwenBatchedVL, folder: Path, sharded: bool) -> None:
    """Saves the model, in shards where told to: the tiny model is cut as a big one would be."""
    split = huggingface_hub.split_torch_state_dict_into_shards
    small = functools.partial(lambda tensors, max_shard_size: split(tensors, max_shard_size="200KB"))
    with mock.patch("huggingface_hub.split_torch_state_dict_into_shards", small if sharded else split):
        model.save_pretrained(folder)


def read(folder: Path) -> list[object]:
    """What our reader finds in a folder, and then transformers'."""
    model, image = QwenBatchedVL.from_pretrained(folder, device="cpu"), transformers.AutoImageProcessor
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    size = image.from_pretrained(folder).size
    return [
        *(digest(model.state_dict()), model.processor.image, model.generation_config, digest(theirs.state_dict())),
        *(size["shortest_edge"], size["longest_edge"], model.processor.prompts.chat_template),
        transformers.AutoTokenizer.from_pretrained(folder).chat_template,
    ]


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Case:
    """One layout to save over, with what the folder holds before and after an undisturbed save of some `seconds`."""

    def __init__(self, model: QwenBatchedVL, root: Path, layout: str, sharded: bool, links: bool) -> None:
        self.folder, self.layout = root / "folder", layout
        work = functools.partial(save, model, self.folder, sharded)
        self.save = functools.partial(save_failing, work, self.folder, links, None, "kill")
        prepare(self.folder, layout)
        self.behind = files(root / "behind")
        self.states = [self.state()]
        start = time.perf_counter()
        result(self.save)
        self.seconds = time.perf_counter() - start
        self.states.append(self.state())
        assert all(old != new for old, new in zip(*self.states, strict=True))

    def state(self) -> tuple[object, object]:
        """What a new process reads, and then the files. Fails where a save wrote through a link."""
        found = result(functools.partial(read, self.folder)), files(self.folder)
        assert files(self.folder.with_name("behind")) == self.behind, f"{self.layout}: wrote through a link"
        return found

    def kill(self, after: float) -> str:
        """Kills a save after so many seconds. Returns which checkpoint the folder then is."""
        prepare(self.folder, self.layout)
        ended, (done, value) = in_a_child(self.save, kill_after=after)
        assert ended == signal.SIGKILL or done, value
        found = self.state()
        assert found in self.states, f"{self.layout}: neither old nor new: {json.dumps(found, default=str)[:2000]}"
        return "old" if found == self.states[0] else "new"


def main() -> None:
    """Prints how often which checkpoint was found; an exception says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a fork of a process with threads may wait for one of them
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as root:
        source = write_checkpoint(Path(root).resolve() / "A", seed=1)
        model = QwenBatchedVL.from_pretrained(source, device="cpu", max_pixels=4 * 784)
        make = functools.cache(lambda *kind: Case(model, source.parent, *kind))
        found: Counter = Counter()
        for _ in range(options.count):
            case = make(chance.choice(options.layouts), chance.random() < 0.5, chance.random() < 0.5)
            found[case.kill(after=chance.uniform(0, 1.1 * case.seconds))] += 1
    for which, count in sorted(found.items()):
        print(f"killed: {count} found the {which} checkpoint")


if __name__ == "__main__":
    main()
