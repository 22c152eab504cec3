"""Saves over a checkpoint that are killed, or find the disk full, at every kind of moment.

    python -m tests.fuzz.kill_while_saving --count 50 --seed 0     # SIGKILL at random moments
    python -m tests.fuzz.kill_while_saving --every-step kill       # before each step on the file system in turn
    python -m tests.fuzz.kill_while_saving --every-step full       # each step that needs space in turn finds none

After each, a process that has seen nothing of it loads the folder: it must be the old checkpoint or the new one, file
by file, with nothing of the save left, to us and (after random kills) to transformers. A full disk must raise an
`OSError` that names a file and leave the old one as it was. The saves go over folders of every layout: one file, shards
and an index, links, foreign and contradicting files; on file systems with and without hard links.
"""

from __future__ import annotations

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
from typing import NamedTuple
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
    "processor_config.json": json.dumps({"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 7840}}}),
    "pytorch_model.bin": b"a pickle",
}
LAYOUTS = ("single", "sharded", "links", "crowded")


class Stage:
    """Two models and folders to save them over.

    Attributes:
        model: What is saved.
        root: Holds everything; folders in it may be replaced at any time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        source = write_checkpoint(root / "A", seed=1)
        self.model = QwenBatchedVL.from_pretrained(source, device="cpu", max_pixels=4 * 784)

    def prepare(self, layout: str, name: str = "folder") -> Path:
        """A fresh folder with the old checkpoint."""
        folder, behind = self.root / name, self.root / f"{name}-behind"
        for path in (folder, behind):
            shutil.rmtree(path, ignore_errors=True)
        write_checkpoint(folder, seed=2, shards=3 if layout in ("sharded", "crowded") else None, key_layout="nested")
        if layout == "links":
            folder.rename(behind)
            folder.mkdir()
            for path in behind.iterdir():
                (folder / path.name).symlink_to(Path("..", behind.name, path.name))
        for file, content in FOREIGN.items() if layout != "single" else ():
            make(folder / file, content)
        for file, content in CONTRADICTING.items() if layout == "crowded" else ():
            make(folder / file, content)
        return folder

    def save(self, folder: Path, sharded: bool) -> None:
        """Saves the model, in shards where told to: the tiny model is cut as a big one would be."""
        split = huggingface_hub.split_torch_state_dict_into_shards
        small = functools.partial(lambda tensors, max_shard_size: split(tensors, max_shard_size="200KB"))
        with mock.patch("huggingface_hub.split_torch_state_dict_into_shards", small if sharded else split):
            self.model.save_pretrained(folder)


def make(path: Path, content: str | bytes | None) -> None:
    """A file, or for None a folder with a file in it."""
    if content is None:
        path.mkdir()
        (path / "tool.jinja").write_bytes(b"of a folder")
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder: Path) -> dict[str, object]:
    """What our reader finds in a folder, as one comparable value."""
    model = QwenBatchedVL.from_pretrained(folder, device="cpu")
    return {
        "weights": digest(model.state_dict()),
        "image": model.processor.image,
        "template": model.processor.prompts.chat_template,
        "generation": model.generation_config,
    }


def read_theirs(folder: Path) -> dict[str, object]:
    """What transformers' readers find in a folder."""
    image = transformers.AutoImageProcessor.from_pretrained(folder)
    return {
        "weights": digest(transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()),
        "image": (image.size["shortest_edge"], image.size["longest_edge"]),
        "template": transformers.AutoTokenizer.from_pretrained(folder).chat_template,
    }


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class State(NamedTuple):
    """A folder with a whole checkpoint, as seen by us, by transformers, and file by file."""

    ours: object
    theirs: object
    files: dict[str, object]

    @classmethod
    def of(cls, folder: Path) -> State:
        """By processes of their own, ours first."""
        ours, theirs = (result(functools.partial(reader, folder)) for reader in (read, read_theirs))
        return cls(ours, theirs, files(folder))


class Case:
    """One layout to save over, with what the folder holds before and after an undisturbed save.

    Attributes:
        seconds: How long that took, process and all.
        steps: How many steps on the file system it has.
    """

    def __init__(self, stage: Stage, layout: str, sharded: bool, links: bool) -> None:
        self.stage, self.layout, self.sharded, self.links = stage, layout, sharded, links
        self.folder = stage.prepare(layout)
        self.linked = self.folder.with_name(f"{self.folder.name}-behind")
        self.behind = files(self.linked) if self.linked.exists() else None
        self.states = {"old": State.of(self.folder)}
        start = time.perf_counter()
        self.steps = result(self.save(step=None, action="kill"))
        self.seconds = time.perf_counter() - start
        self.states["new"] = State.of(self.folder)
        for old, new in zip(*self.states.values(), strict=True):
            assert old != new

    def save(self, step: int | None, action: str) -> functools.partial:
        """The save of this case, disturbed before that step."""
        save = functools.partial(self.stage.save, self.folder, self.sharded)
        return functools.partial(save_failing, save, self.folder, self.links, step, action)

    def judge(self, theirs: bool) -> str:
        """Which checkpoint a new process finds. Fails where it is neither, or something is left of the save."""
        ours = result(functools.partial(read, self.folder))
        which = next((name for name, state in self.states.items() if state.ours == ours), None)
        assert which, f"{self}: neither old nor new: {ours}"
        self.check_files(which)
        assert not theirs or State.of(self.folder) == self.states[which], f"{self}: another to transformers"
        return which

    def check_files(self, which: str) -> None:
        """Fails where the folder is not, file by file, that of before or after a whole save."""
        found, expected = files(self.folder), self.states[which].files
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        assert not wrong, f"{self}: {which}, but {wrong}"
        assert self.behind is None or files(self.linked) == self.behind, f"{self}: wrote through a link"

    def kill(self, after: float | None = None, step: int | None = None) -> str:
        """Kills a save after so many seconds or before a step. Returns what a new process finds."""
        self.stage.prepare(self.layout)
        ended, (done, value) = in_a_child(self.save(step, "kill"), kill_after=after)
        assert ended == signal.SIGKILL or (done and step is None), f"{self}: {value}"
        return self.judge(theirs=step is None)

    def fill(self, step: int) -> str:
        """Lets a save find no space from a step on. Returns what it came to."""
        self.stage.prepare(self.layout)
        _, (done, what) = in_a_child(self.save(step, "full"))
        if not done:
            kinds, file, trace = what
            assert OSError in kinds and str(self.folder) in str(file), trace
        self.check_files("new" if done else "old")
        return "new" if done else "old"

    def __str__(self) -> str:
        return f"{self.layout}{', sharded' * self.sharded}{', no hard links' * (not self.links)}"


def main() -> None:
    """Runs what the command line asks for; an exception says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=0, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-step", choices=("kill", "full"), action="append", default=[])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a fork of a process with threads may wait for one of them
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as root:
        stage = Stage(Path(root).resolve())
        kinds = [(layout, sharded, links) for layout in options.layouts for sharded in (0, 1) for links in (1, 0)]
        cases = {kind: None for kind in kinds}
        found: Counter = Counter()
        for _ in range(options.count):
            kind = chance.choice(kinds)
            cases[kind] = case = cases[kind] or Case(stage, *kind)
            found["killed", case.kill(after=chance.uniform(0, 1.1 * case.seconds))] += 1
        for action in options.every_step:
            for kind in kinds:
                cases[kind] = case = cases[kind] or Case(stage, *kind)
                for step in range(1, case.steps + 1):
                    found[action, case.kill(step=step) if action == "kill" else case.fill(step)] += 1
    for (what, which), count in sorted(found.items()):
        print(f"{what}: {count} found the {which} checkpoint")


if __name__ == "__main__":
    main()
