"""Damages checkpoints in many ways and loads each: a ValueError that names what is damaged, or a model that runs.

    python -m tests.fuzz.damaged_checkpoints --count 1000 --seed 0

Each case is a fresh copy of a tiny checkpoint, damaged once. It is loaded in a process of its own kind, which is ended
where it takes too long; a case may take `SECONDS` and its process `MEGABYTES` of memory above what it had at first.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_batched.testing import write_checkpoint

SECONDS, MEGABYTES, MAX_MESSAGE = 20, 2000, 2000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MIN_IMAGE = {"min_pixels": 28 * 28}

# Of a JSON file: what no field should be. None of it may ask for memory or loop.
WRONG_VALUES = [
    *(None, True, False, 0, 1, -1, 3, 97, 2.5, -0.5, 1e-300, 1e18, 10**15, 2**31, 2**63, 2**70, 10**400),
    *(float("nan"), float("inf"), "", "x", "1", "x" * 100_000, "\ud800", "../config.json", "/dev/zero"),
    *([], {}, [0], [-1], ["x"], [1, 2, 3], [None], {"x": 1}, {"type": "mrope"}, [[1]], [7] * 10_000),
]
WRONG_WHOLES = [b"", b"{", b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000]


@dataclass(frozen=True)
class Damage:
    """What was done. `refused`: the format shows it, so that loading must fail; `named`: the file to be named."""

    what: str
    named: str | None = None
    refused: bool = False


# --- damages: each takes a folder and a source of chance ---


def json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".json")


def small_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".txt"))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def damage_bytes(folder: Path, chance: random.Random) -> Damage:
    """Bytes of a small file: cut, changed, zeroed, put in."""
    path = chance.choice(small_files(folder))
    content = bytearray(path.read_bytes())
    how = chance.choice(["cut", "changed", "zeroed", "put in", "not UTF-8"])
    place = chance.randrange(len(content))
    if how == "cut":
        del content[place:]
    elif how == "changed":
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.choice(b'0159-.e"[]{},:x \x00\x7f')
    elif how == "zeroed":
        end = min(len(content), place + chance.randint(1, 200))
        content[place:end] = bytes(end - place)
    elif how == "put in":
        content[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 20)))
    else:
        content[place:place] = b"\xff\xfe"
    path.write_bytes(content)
    return Damage(f"{path.name}: bytes {how}", path.name, refused=how == "not UTF-8")


def replace_whole(folder: Path, chance: random.Random) -> Damage:
    """A JSON file's whole content, by what is no object or no JSON."""
    path = chance.choice(json_files(folder))
    content = chance.choice(WRONG_WHOLES)
    path.write_bytes(content)
    return Damage(f"{path.name}: {content[:10]!r} in its place", path.name, refused=content != b"{}")


def fields_of(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside nested objects and lists; of long ones the first few."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for number, (name, value) in enumerate(items):
        if number < 40:
            yield (*path, name)
            yield from fields_of(value, (*path, name))


def damage_field(folder: Path, chance: random.Random) -> Damage:
    """A field of a JSON file: another value, dropped, renamed, written twice."""
    path = chance.choice(json_files(folder))
    content = json.loads(path.read_text())
    *way, name = chance.choice(list(fields_of(content)))
    inner = content
    for step in way:
        inner = inner[step]
    how = chance.choice(["replaced", "replaced", "replaced", "dropped", "renamed", "twice"])
    if how == "dropped":
        del inner[name]
    elif how == "renamed" and isinstance(inner, dict):
        inner[f"{name}x"] = inner.pop(name)
    else:
        inner[name] = chance.choice(WRONG_VALUES)
    text = json.dumps(content)
    if how == "twice" and isinstance(inner, dict):
        pair = f"{json.dumps(name)}: {json.dumps(inner[name])}"
        text = text.replace(pair, f"{pair}, {pair}", 1)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return Damage(f"{path.name}: {'.'.join(map(str, (*way, name)))} {how}")


def damage_size(folder: Path, chance: random.Random) -> Damage:
    """A number of config.json that memory or time depends on, far too large."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    vision = ["depth", "hidden_size", "intermediate_size", "out_hidden_size", "patch_size", "temporal_patch_size"]
    inner = content.get("text_config", content) if chance.random() < 0.5 else content["vision_config"]
    name = chance.choice(vision if inner is content["vision_config"] else fields)
    inner[name] = chance.choice([10**6, 2**30, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30])
    path.write_text(json.dumps(content))
    return Damage(f"config.json: {name} = {inner[name]}", refused=True)


def huge_json(folder: Path, chance: random.Random) -> Damage:
    """A small file of a hundred megabytes."""
    path = chance.choice(json_files(folder))
    unit, rest = chance.choice([(b"{},", b"{}]"), (b'"x",', b'"x"]'), (b" ", b"{}]")])
    with path.open("wb") as file:
        file.write(b'{"a": [' + unit * (100 * 2**20 // len(unit)) + rest + b"}")
    return Damage(f"{path.name}: 100 MB", path.name, refused=True)


def bind_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


# What is no file, by how it is put in a file's place.
KINDS: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "socket": bind_socket,
    "loop of links": lambda path: path.symlink_to(path.name),
    "link to a folder": lambda path: path.symlink_to(".."),
}


def other_kind(folder: Path, chance: random.Random) -> Damage:
    """What is no file in a file's place."""
    names = [path.name for path in folder.iterdir()]
    if chance.random() < 0.3:  # one that need not be there, and would be read first
        names = [SINGLE, INDEX, "chat_template.jinja", "processor_config.json", "added_tokens.json"]
        names += ["special_tokens_map.json", "tokenizer.4.0.0.json", "tokenizer.model"]
    path = folder / chance.choice(sorted(names))
    kind = chance.choice(sorted(KINDS))
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    optional = path.name.startswith("tokenizer.") and path.name != "tokenizer.json" and "folder" in kind
    shadowed = path.name == INDEX and (folder / SINGLE).exists() and "folder" in kind
    return Damage(f"{path.name}: a {kind}", path.name, refused=not optional and not shadowed)


def missing(folder: Path, chance: random.Random) -> Damage:
    """A file that is not there, or a link to nothing."""
    path = chance.choice(sorted(folder.iterdir()))
    path.unlink()
    if chance.random() < 0.3:
        path.symlink_to("nowhere")
    needed = path.name in ("config.json", SINGLE, INDEX) or path.suffix == ".safetensors"
    return Damage(f"{path.name}: missing", path.name if needed else None, refused=needed)


def damage_weights(folder: Path, chance: random.Random) -> Damage:
    """Bytes of a safetensors file."""
    path = chance.choice(weight_files(folder))
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    how = chance.choice(["cut", "header changed", "header zeroed", "length", "body changed", "appended", "garbage"])
    if how == "cut":
        del content[chance.choice([0, 7, 8, header_end, chance.randrange(len(content))]) :]
    elif how == "header changed":
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(8, header_end)] = chance.choice(b'0159-.e"[]{},x \x00\xff')
    elif how == "header zeroed":
        place = chance.randrange(8, header_end)
        content[place : place + 50] = bytes(len(content[place : place + 50]))
    elif how == "length":
        content[:8] = chance.choice([0, 1, header_end, len(content), 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little")
    elif how == "body changed":
        place = chance.randrange(header_end, len(content) - 400)
        content[place : place + 400] = chance.choice([bytes(400), b"\xff" * 400, chance.randbytes(400)])
    elif how == "appended":
        content += bytes(chance.randint(1, 1000))
    else:
        content[:] = chance.choice([bytes(4096), b"\xff" * 4096, b"<html>not found</html>", b"PK\x03\x04" * 64])
    path.write_bytes(content)
    return Damage(f"{path.name}: {how}", path.name, refused=how not in ("body changed", "header changed"))


def damage_header(folder: Path, chance: random.Random) -> Damage:
    """One tensor of a safetensors header: its name, shape, dtype or place; the rest of the file is as it was."""
    path = chance.choice(weight_files(folder))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    key = chance.choice(sorted(name for name in header if name != "__metadata__"))
    entry, refused = header[key], True
    how = chance.choice(["dropped", "renamed", "shape", "dtype", "offsets", "twice", "long name", "transposed"])
    if how in ("dropped", "renamed", "long name"):
        del header[key]
        if how != "dropped":
            header[f"{key}x" if how == "renamed" else "x" * 200_000] = entry
    elif how == "shape":
        entry["shape"] = chance.choice([[], [0], [1, *entry["shape"]], [2**62, 2**62], [2**40], ["x"], None, -1])
    elif how == "dtype":
        entry["dtype"] = chance.choice(["F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "X", None, 3])
    elif how == "offsets":
        entry["data_offsets"] = chance.choice([[0, 0], [0, 2**62], [-1, 4], [8, 4], [2**63, 2**64], [1.5, 2], None])
    elif how == "twice":
        header[f"model.{key}" if not key.startswith("model.") else key.replace("model.", "model.model.", 1)] = entry
    else:
        entry["shape"] = entry["shape"][::-1]
        refused = entry["shape"] != entry["shape"][::-1]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + body)
    return Damage(f"{path.name}: {key} {how}", refused=refused)


def damage_index(folder: Path, chance: random.Random) -> Damage:
    """The map of a sharded checkpoint; one of a single file gets an index beside it, which is not read."""
    path = folder / INDEX
    if not path.exists():
        path.write_text(json.dumps({"weight_map": {"x": "/dev/zero"}}))
        return Damage("an index beside a single file")
    index = json.loads(path.read_text())
    key = chance.choice(sorted(index["weight_map"]))
    name = chance.choice(
        [
            *("../x.safetensors", "/dev/zero", "/etc/hostname", INDEX, "config.json", "", ".", "..", "x\x00y"),
            7,
            None,
            [],
        ]
    )
    index["weight_map"][key] = name
    path.write_text(json.dumps(index))
    return Damage(f"{INDEX}: {key} in {name!r}", refused=True)


DAMAGES = (
    *(damage_bytes, damage_bytes, replace_whole, damage_field, damage_field, damage_field, damage_size, other_kind),
    *(other_kind, missing, damage_weights, damage_weights, damage_header, damage_header, damage_index),
)


def damaged(bases: list[Path], folder: Path, seed: int, number: int) -> Damage:
    """Makes `folder`, the case of that number."""
    chance = random.Random(f"{seed} {number}")
    shutil.copytree(chance.choice(bases), folder)
    # Writing a hundred megabytes takes a while: now and then is enough.
    damage = huge_json if number % 50 == 49 else chance.choice(DAMAGES)
    return damage(folder, chance)


def write_bases(root: Path) -> list[Path]:
    """Undamaged checkpoints: published, nested in shards, untied with the files of transformers 5."""
    published = write_checkpoint(root / "published", image=MIN_IMAGE)
    nested = write_checkpoint(root / "nested", image=MIN_IMAGE, key_layout="nested", config_layout="nested", shards=3)
    newer = write_checkpoint(root / "newer", image=MIN_IMAGE, config_layout="nested", tied=False)
    image = json.loads((newer / "preprocessor_config.json").read_text())
    (newer / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    template = json.loads((newer / "chat_template.json").read_text())["chat_template"]
    (newer / "chat_template.jinja").write_text(template)
    for name in ("preprocessor_config.json", "chat_template.json", "generation_config.json"):
        (newer / name).unlink()
    return [published, nested, newer]


# --- the process that loads ---


def load_all() -> None:
    """Loads each folder named on stdin and answers with one line of JSON. Imports what is heavy once."""
    import torch

    from qwen_batched import QwenBatchedVL

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    frames = torch.randint(0, 256, (2, 1, 3, 56, 84), dtype=torch.uint8)

    def attempt(folder: str) -> dict[str, str]:
        stage = "loading"
        try:
            model = QwenBatchedVL.from_pretrained(folder, device="cpu")
            stage = "running"
            with torch.no_grad():
                out = model(frames, ["Go.", "Pick up the block."])
                model.generate(frames, ["Go.", "Stop."], max_new_tokens=2)
            shape = (*out.input_ids.shape, model.config.text.hidden_size)
            assert out.last_hidden_state.shape == shape, "hidden states of another shape"
        except (ValueError, TypeError) as error:
            return {"outcome": "refused", "stage": stage, "error": type(error).__name__, "message": str(error)}
        except BaseException as error:  # a panic of a Rust library is no Exception
            return {"outcome": "broken", "stage": stage, "error": type(error).__name__, "message": str(error)}
        return {"outcome": "loaded"}

    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        answer = attempt(json.loads(line))
        answer["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(answer), file=answers, flush=True)


class Loader:
    """The process, started anew where a case ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._megabytes = 0

    def load(self, folder: Path) -> dict:
        """What comes of loading a folder; "broken" where that is no ValueError, or too slow or too large."""
        self._process.stdin.write(json.dumps(str(folder)) + "\n")
        self._process.stdin.flush()
        answer = self._answer(SECONDS)
        if answer is None:
            died = self._process.poll()
            self.close()
            return {"outcome": "broken", "error": "timeout" if died is None else f"exit {died}", "message": ""}
        used = answer["megabytes"] - self._megabytes
        if used > MEGABYTES:
            return answer | {"outcome": "broken", "error": "memory", "message": f"{used} MB"}
        if used > MEGABYTES // 4:  # the peak never falls: a fresh process measures the next case from the ground
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def start(self) -> None:
        """Starts the process where there is none, and sees an undamaged checkpoint load."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "tests.fuzz.damaged_checkpoints", "--loader"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # no terminal: /dev/tty then has nothing to wait for
        )
        if self._answer(300) is None:
            raise RuntimeError("the loading process does not start")
        with tempfile.TemporaryDirectory() as root:
            self._process.stdin.write(json.dumps(str(write_checkpoint(Path(root) / "c", image=MIN_IMAGE))) + "\n")
            self._process.stdin.flush()
            first = self._answer(300)
        if first is None or first["outcome"] != "loaded":
            raise RuntimeError(f"an undamaged checkpoint does not load: {first}")
        self._megabytes = first["megabytes"]

    def _answer(self, seconds: float) -> dict | None:
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        return json.loads(line) if line else None


# --- the judgement ---


def fault(folder: Path, damage: Damage, answer: dict) -> str | None:
    """What is wrong with the outcome; None where nothing is."""
    if answer["outcome"] == "broken":
        return f"{answer['error']}: {answer['message'][:300]}"
    if answer["outcome"] == "loaded":
        return "loaded, though the format shows the damage" if damage.refused else None
    message = answer["message"]
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters"
    if answer["stage"] == "loading" and str(folder) not in message:
        return f"the folder is not named: {message[:300]}"
    if damage.refused and damage.named is not None and damage.named not in message:
        return f"{damage.named} is not named: {message[:300]}"
    return None


def run(loader: Loader, count: int, seed: int, first: int = 0, verbose: bool = False) -> list[str]:
    """Runs `count` cases. Returns the faults; prints a summary in one line."""
    faults, outcomes, slowest = [], Counter(), 0.0
    with tempfile.TemporaryDirectory() as root:
        bases = write_bases(Path(root) / "bases")
        for number in range(first, first + count):
            folder = Path(root) / f"case{number}"
            damage = damaged(bases, folder, seed, number)
            loader.start()
            begun = time.monotonic()
            answer = loader.load(folder)
            slowest = max(slowest, time.monotonic() - begun)
            outcomes[answer["outcome"]] += 1
            wrong = fault(folder, damage, answer)
            if wrong is not None:
                faults.append(f"case {number} ({damage.what}): {wrong}")
            if verbose:
                print(number, damage.what, "->", answer.get("message", answer["outcome"])[:200], flush=True)
            shutil.rmtree(folder)
    print(
        f"damaged checkpoints: {count} cases of seed {seed}: {outcomes['loaded']} loaded, "
        f"{outcomes['refused']} refused, {len(faults)} faults; slowest {slowest:.1f} s"
    )
    return faults


def main() -> int:
    """The command line; the exit status is 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--loader", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loader:
        load_all()
        return 0
    with contextlib.closing(Loader()) as loader:
        faults = run(loader, arguments.count, arguments.seed, arguments.first, arguments.verbose)
    for line in faults:
        print(line)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
