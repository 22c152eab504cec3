"""Damaged adapters: each is refused with a ValueError that names its folder, and the model is as it was.

    python -m tests.fuzz.damaged_adapters --count 300 --seed 0

Damage that the format cannot show (bits of a weight, a setting that is another valid one) may load.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qwen_batched import QwenBatchedVL
from qwen_batched.lora import load_adapter, save_adapter
from qwen_batched.testing import write_checkpoint

SECONDS = 20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENDLESS = r"(.|.)*(?=x)(.|.)*y"  # a pattern that backtracks without end on any name
GOOD = {
    "plain": {"target_modules": ["q_proj", "v_proj", "qkv"]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["merger", "embed_tokens"]},
    "dora": {"target_modules": ["o_proj"], "use_dora": True},
    "biases": {"target_modules": ["v_proj"], "bias": "lora_only"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 8]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
}
NO_TEXT = [None, 7, 1.5, True, {}, [], "", [None], [7], {"a": 1}, [""]]
# Of each field, values that it cannot have.
WRONG = {
    "r": [0, -4, 4.0, "4", None, [4], True, 10**9, 10**30, 3],
    "lora_alpha": ["16", None, [8], {}, True, float("nan"), float("inf")],
    "lora_dropout": ["0.1", None, -0.1, 2, [0.0], float("nan")],
    "target_modules": [
        ENDLESS,
        *NO_TEXT,
        "(",
        ["x_proj"],
        "x",
        ["q_proj", "v_proj", "qkv", "k_proj"],
        ["embed_tokens", "down_proj"],
    ],
    "bias": ["x", "lora", 1, None, [], "ALL"],
    "alpha_pattern": [{ENDLESS: 1}, [1], "x", 7, {"q_proj": "x"}, {"(": 1}, {"q_proj": None}, {"q_proj": [1]}],
    "rank_pattern": [{ENDLESS: 1}, [1], "x", 7, {"(": 1}, {".*": 10**9}, {".*": 0}, {".*": "4"}, {".*": 3}],
    "exclude_modules": [ENDLESS, 7, True, "(", [7], {"a": 1}, ".*"],
    "modules_to_save": [7, "merger", True, {"a": 1}, [7], [""], ["norm"], ["proj"]],
    "layers_to_transform": ["x", 1.5, True, [-1], ["x"], {"a": 1}],
    "trainable_token_indices": ["x", 7, True, [-1], [10**9], [1.5], ["x"], {"embed_tokens": 7}, {"": [1]}, [1]],
    "use_dora": ["yes", 1, None, [], "false"],
    "use_rslora": ["yes", 1, None, []],
    "lora_bias": ["yes", 1, None, True],
    "ensure_weight_tying": ["yes", 1, None],
    "init_lora_weights": [7, None, [], {}],
    "peft_type": [
        "X",
        None,
        7,
        [],
        {},
        "ADALORA",
        "IA3",
        "LOHA",
        "lora",
        "LORA ",
        "VERA",
        "PREFIX_TUNING",
        "x" * 10**5,
    ],
    "target_parameters": [["a"], "x", 7],
    "layer_replication": [[[0, 4]], "x"],
    "alora_invocation_tokens": [[1, 2], 7],
    "use_qalora": [True, "x"],
    "megatron_config": [{"a": 1}],
    "surprise": [1, True, "x", [1], {"a": 1}, "x" * 10**5],
}


class Folder:
    """A copy of a good adapter, to be damaged."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.config, self.weights, self.rng = path / CONFIG, path / WEIGHTS, rng

    def settings(self) -> dict:
        return json.loads(self.config.read_text())

    def write_settings(self, settings: object) -> None:
        self.config.write_text(json.dumps(settings))

    def write_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def either(self) -> Path:
        return self.rng.choice([self.config, self.weights])


def wrong_field(folder: Folder) -> str:
    name = folder.rng.choice(sorted(WRONG))
    value = folder.rng.choice(WRONG[name])
    before = folder.settings()
    if before.get(name) == value and type(before.get(name)) is type(value):
        return wrong_field(folder)
    folder.write_settings(before | {name: value})
    return f"{name} = {str(value)[:40]!r}"


def missing_field(folder: Folder) -> str:
    settings = folder.settings()
    name = folder.rng.choice(["peft_type", "r", "lora_alpha", "target_modules"])
    del settings[name]
    folder.write_settings(settings)
    return name


def no_object(folder: Folder) -> str:
    content = folder.rng.choice(
        [
            *(b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe{}", b"[" * 10**5, b"{}"),
            *(b'{"peft_type": "LORA"}', b"\0" * 99),
        ]
    )
    folder.config.write_bytes(content)
    return repr(content[:20])


def cut(folder: Folder) -> str:
    file = folder.either()
    size = folder.rng.randrange(file.stat().st_size - 1)
    os.truncate(file, size)
    return f"{file.name} at {size}"


def no_file(folder: Folder) -> str:
    file = folder.either()
    file.unlink()
    kind = folder.rng.choice(
        ["missing", "a folder", "a pipe", "an endless device", "a link to nothing", "a link to itself"]
    )
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind != "missing":
        file.symlink_to({"an endless device": "/dev/zero", "a link to nothing": "nowhere"}.get(kind, file.name))
    return f"{file.name} is {kind}"


def damaged_header(folder: Folder) -> str:
    data = bytearray(folder.weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    kind = folder.rng.choice(["length", "text", "longer", "garbage"])
    if kind == "length":
        data[:8] = folder.rng.choice([0, 1, length + 8, 2**40, 2**64 - 1]).to_bytes(8, "little")
    elif kind == "text":
        data[8 + folder.rng.randrange(length // 2)] = folder.rng.choice(b"\x00\xff}{")
    elif kind == "longer":
        data += b"x" * 64
    else:
        data = bytearray(folder.rng.randbytes(len(data)))
    folder.weights.write_bytes(data)
    return kind


def wrong_tensor(folder: Folder) -> str:
    tensors = load_file(folder.weights)
    key = folder.rng.choice(sorted(tensors))
    value = tensors[key]
    kinds: dict[str, Callable[[], torch.Tensor | None]] = {
        "is missing": lambda: None,
        "has a row more": lambda: torch.cat((value, value[:1])),
        "is transposed twice": lambda: value[None],
        "is empty": lambda: value[:0],
        "is a scalar": lambda: value.flatten()[0].clone(),
        "holds ints": lambda: value.to(torch.int64),
        "holds flags": lambda: value > 0,
        "holds bytes": lambda: value.to(torch.float8_e4m3fn),
        "holds a NaN": lambda: value.clone().index_fill_(0, torch.tensor([0]), torch.nan),
        "is infinite": lambda: value.clone().fill_(torch.inf),
    }
    kind = folder.rng.choice(sorted(kinds))
    del tensors[key]
    new = kinds[kind]()
    if new is not None:
        tensors[key] = new
    folder.write_tensors(tensors)
    return f"{key} {kind}"


def wrong_key(folder: Folder) -> str:
    tensors = load_file(folder.weights)
    key = folder.rng.choice(sorted(tensors))
    value = tensors[key]
    old = key.replace(".model.language_model.", ".model.").replace(".model.visual.", ".visual.")
    names = {
        "cut": key.removeprefix("base_model.model."),
        "another": key[:-2] + "x",
        "a layer beyond": key.replace("layers.0", "layers.99").replace("blocks.0", "blocks.99"),
        "of a policy": key.replace("base_model.model.", "base_model.model.backbone."),
        "long": key + "x" * 10**4,
        "empty": "",
    }
    kind = folder.rng.choice(sorted({**names, "twice": ""}))
    if kind == "twice" and old != key:
        tensors[old] = value.clone()
    else:
        new = names.get(kind, key + ".more")
        del tensors[key]
        tensors[new if new != key else key + "x"] = value
    folder.write_tensors(tensors)
    return f"{kind}: {key}"


def all_keys_gone(folder: Folder) -> str:
    folder.write_tensors(folder.rng.choice([{}, {"x": torch.zeros(1)}, {"base_model.model.x": torch.zeros(1)}]))
    return "no tensor of the adapter"


DAMAGES = (
    *(wrong_field, wrong_field, wrong_field, missing_field, no_object, cut, no_file),
    *(damaged_header, wrong_tensor, wrong_tensor, wrong_key, all_keys_gone),
)


def write_good(root: Path) -> list[Path]:
    """A checkpoint at `root / "base"`, and the good adapters."""
    base = write_checkpoint(root / "base", image={"min_pixels": 28 * 28})
    folders = []
    for name, settings in GOOD.items():
        torch.manual_seed(0)
        adapted = get_peft_model(QwenBatchedVL.from_pretrained(base, device="cpu"), LoraConfig(r=4, **settings))
        save_adapter(adapted, root / name)
        folders.append(root / name)
    return folders


def state_of(model: torch.nn.Module) -> list:
    """All that an adapter could change, values apart."""
    modules = [(name, type(child), sorted(vars(child))) for name, child in model.named_modules()]
    hooks = [len(value) for child in model.modules() for value in vars(child).values() if isinstance(value, dict)]
    parameters = [(name, id(x), x.data_ptr(), x.requires_grad) for name, x in model.named_parameters()]
    return [modules, hooks, parameters]


def faults(count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """What was damaged, and what is wrong with the answer to it; None where nothing is."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(temporary)
        good = write_good(root)
        model = QwenBatchedVL.from_pretrained(root / "base", device="cpu")
        values = {name: x.detach().clone() for name, x in model.named_parameters()}
        before, expected = state_of(model), model(None, ["go"]).last_hidden_state
        for number in range(count):
            source, damage = rng.choice(good), rng.choice(DAMAGES)
            path = root / f"damaged {number}"
            shutil.copytree(source, path)
            what = f"{number}: {source.name}: {damage.__name__}: {damage(Folder(path, rng))}"
            start, fault = time.monotonic(), None
            try:
                load_adapter(model, path)
                fault = "loaded"
            except ValueError as error:
                if str(path) not in str(error) or len(str(error)) > 2000:
                    fault = f"{len(str(error))} characters, or without the folder's name: {str(error)[:300]}"
            except Exception as error:
                fault = f"{type(error).__name__}: {str(error)[:300]}"
            if fault is None and time.monotonic() - start > SECONDS:
                fault = f"took more than {SECONDS} s"
            if fault != "loaded" and state_of(model) != before:
                fault = f"{fault}; the model has changed"
            if fault is not None:
                model = QwenBatchedVL.from_pretrained(root / "base", device="cpu")
                before = state_of(model)
            shutil.rmtree(path)
            yield what, fault
        if any(not torch.equal(x, values[name]) for name, x in model.named_parameters()):
            yield "values", "have changed"
        if not torch.equal(model(None, ["go"]).last_hidden_state, expected):
            yield "the next call", "gives another result"


def main() -> int:
    """Prints each fault, and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    for what, fault in faults(options.count, options.seed):
        kinds["refused" if fault is None else "fault"] += 1
        if fault is not None:
            print(what, "->", fault, flush=True)
    print(f"{kinds['refused']} damaged adapters refused, {kinds['fault']} faults")
    return int(kinds["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
