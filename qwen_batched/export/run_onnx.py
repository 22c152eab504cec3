"""`python -m qwen_batched.export.run_onnx FOLDER IMAGE... --text TEXT`: frames and a text to generated text.

Runs an exported `onnx` folder on ONNX Runtime, with NumPy, Pillow and the tokenizers library; PyTorch is not imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from qwen_batched.export.manifest_reading import Kinds, read_manifest

__all__ = ["OnnxModel"]

TEXT = "{text}"  # stands for the text in the manifest's prompt


class OnnxModel:
    """An exported folder, run greedily, one batch of samples with the same number of cameras at a time."""

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        """Opens the folder's graphs. Raises `ValueError` where it is no `onnx` export of this format, with a prompt."""
        folder = Path(folder)
        manifest = read_manifest(folder, "onnx", _NEEDED)
        missing = [name for name in _PARTS if name not in manifest["parts"]]
        if missing or manifest["prompt"] is None:
            expected = f"the parts {', '.join(_PARTS)} and a prompt, of a model with a chat template"
            found = f"{', '.join(manifest['parts'])}{' without a prompt' * (manifest['prompt'] is None)}"
            raise ValueError(f"{folder} must hold {expected}, got {found}")
        self.manifest: dict[str, Any] = manifest
        sessions = (onnxruntime.InferenceSession(folder / f"{f}.onnx", providers=[*providers]) for f in _PARTS)
        self._vision, self._decoder = sessions
        # The checkpoint's, and one to which control tokens in a text are text.
        files = ("tokenizer.json", "text_tokenizer.json")
        self._tokenizer, self._text_tokenizer = (Tokenizer.from_file(str(folder / name)) for name in files)
        self._renumbered = {int(ours): theirs for ours, theirs in manifest["renumbered"].items()}
        self._names = {each.name for each in self._decoder.get_inputs()}

    def encode_images(self, frames: np.ndarray) -> list[np.ndarray]:
        """Features (B, V, T_img, D) of frames (B, V, 3, H, W), and deep ones (B, L, V, T_img, D) if there are any."""
        size = tuple(self.manifest["frames"]["source"])
        if frames.ndim != 5 or frames.shape[1:] != (self.manifest["cameras"], 3, *size):
            expected = f"(B, {self.manifest['cameras']}, 3, {size[0]}, {size[1]})"
            raise ValueError(f"frames must be {expected}, got {frames.shape}")
        if str(frames.dtype) != self.manifest["frames"]["dtype"]:
            raise ValueError(f"frames must be {self.manifest['frames']['dtype']}, got {frames.dtype}")
        return self._vision.run(None, {"frames": frames})

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a prompt, images in their places."""
        ids: list[int] = []
        image_tokens, image = self.manifest["grid"][0] * self.manifest["grid"][1], self.manifest["image_token_id"]
        for piece in self.manifest["prompt"]:
            if piece == image:
                ids += [image] * image_tokens
            elif isinstance(piece, int):
                ids.append(piece)
            else:
                encoding = self._text_tokenizer.encode(piece.replace(TEXT, text), add_special_tokens=False)
                ids += [self._renumbered.get(index, index) for index in encoding.ids]
        return ids

    def generate(self, frames: np.ndarray, texts: Sequence[str], max_new_tokens: int = 64) -> list[list[int]]:
        """Greedy tokens of each sample, up to and with the first that ends it.

        As the live `generate`, with the checkpoint's end tokens and repetition penalty.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a list of strings, got {type(texts).__name__}")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")
        least, most = self.manifest["batch"]
        if not least <= len(frames) <= most:
            raise ValueError(f"frames must be of {least} to {most} samples, got {len(frames)}")
        if len(texts) != len(frames):
            raise ValueError(f"texts must be one for each of {len(frames)} samples, got {len(texts)}")
        rows = [self.encode_text(text) for text in texts]
        length = max(map(len, rows))
        ids = np.full((len(rows), length), self.manifest["pad_token_id"], np.int64)
        mask = np.zeros_like(ids)
        for row, tokens, seen in zip(ids, rows, mask, strict=True):
            row[length - len(tokens) :], seen[length - len(tokens) :] = tokens, 1
        is_image = (ids == self.manifest["image_token_id"]) & (mask != 0)
        main, *deep = self.encode_images(frames)
        inputs = {"image_embeds": _placed(main.reshape(len(ids), -1, main.shape[-1]), is_image)}
        if deep:
            layers = [_placed(x.reshape(len(ids), -1, x.shape[-1]), is_image) for x in np.moveaxis(deep[0], 1, 0)]
            inputs["deep_embeds"] = np.stack(layers, axis=1)
        positions = _rope_positions(is_image, mask != 0, self.manifest["grid"])
        cache = [np.zeros(self._cache_shape(len(ids)), main.dtype)] * 2
        return self._decode(ids, mask, positions, inputs, cache, max_new_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _decode(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        positions: np.ndarray,
        images: dict[str, np.ndarray],
        cache: list[np.ndarray],
        max_new_tokens: int,
    ) -> list[list[int]]:
        ends, new = set(self.manifest["eos_token_ids"]), [[] for _ in ids]
        penalty, seen = self.manifest["repetition_penalty"], None  # tokens of the prompt or of what was generated
        for _ in range(max_new_tokens):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **images}
            inputs |= {"past_keys": cache[0], "past_values": cache[1]}
            logits, *cache = self._decoder.run(None, {name: inputs[name] for name in self._names})
            scores = logits[:, -1].astype(np.float32)
            if seen is None:
                seen = np.zeros(scores.shape, bool)
                rows, columns = np.nonzero(mask)
                seen[rows, ids[rows, columns]] = True
            chosen = np.where(seen, _penalised(scores, penalty), scores).argmax(axis=-1)
            seen[np.arange(len(chosen)), chosen] = True
            for tokens, token in zip(new, chosen.tolist(), strict=True):
                if not tokens or tokens[-1] not in ends:
                    tokens.append(token)
            if all(tokens[-1] in ends for tokens in new):
                break
            ids, mask = chosen[:, None], np.concatenate((mask, np.ones_like(chosen[:, None])), axis=1)
            positions = np.broadcast_to(positions.max(axis=(0, 2))[None, :, None] + 1, (3, len(ids), 1))
            images = {name: np.zeros_like(x[..., :1, :]) for name, x in images.items()}
        return new

    def _cache_shape(self, batch: int) -> tuple[int, ...]:
        layers, _, _, heads, size = next(x.shape for x in self._decoder.get_inputs() if x.name == "past_keys")
        return layers, batch, 0, heads, size


_PARTS = ("vision", "cached_decoder")
_NEEDED: Kinds = {
    **{"parts": list, "prompt": (list, type(None)), "frames.source": list, "frames.dtype": str, "cameras": int},
    **{"batch": list, "grid": list, "image_token_id": int, "pad_token_id": int, "eos_token_ids": list},
    **{"repetition_penalty": (float, int), "renumbered": dict},
}


def _rope_positions(is_image: np.ndarray, mask: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Rope positions int64 (3, B, S), where all images have `grid` (h, w); 0 on padding."""
    h, w = grid
    cell = (is_image.cumsum(axis=1) - 1) % (h * w)
    advance = np.where(is_image, (cell == h * w - 1) * max(h, w), 1) * mask
    first = advance.cumsum(axis=1) - advance
    row, column = np.where(is_image, cell // w, 0), np.where(is_image, cell % w, 0)
    return np.stack((first, first + row, first + column)).astype(np.int64) * mask


def _penalised(scores: np.ndarray, penalty: float) -> np.ndarray:
    """Scores as the repetition penalty makes them (Keskar et al. 2019, arXiv:1909.05858)."""
    return np.where(scores > 0, scores / np.float32(penalty), scores * np.float32(penalty))


def _placed(features: np.ndarray, is_image: np.ndarray) -> np.ndarray:
    """A sample's features (B, M, D) in the place of its image tokens, (B, S, D), zeros elsewhere."""
    placed = np.zeros((*is_image.shape, features.shape[-1]), features.dtype)
    placed[is_image] = features.reshape(-1, features.shape[-1])
    return placed


def main(arguments: list[str] | None = None) -> int:
    """Prints the generated text. Returns 0, or 2 with a line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.export.run_onnx", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"run_onnx: {message}\n")
    parser.add_argument("folder", help="written by --target onnx")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="one for each camera, of the exported size")
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of ONNX Runtime")
    options = parser.parse_args(arguments)
    try:
        model = OnnxModel(options.folder, [options.provider])
        if len(options.images) != model.manifest["cameras"]:
            raise ValueError(f"expected an image for each of {model.manifest['cameras']} cameras")
        frames = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in options.images])
        if model.manifest["frames"]["dtype"] != "uint8":
            frames = (frames / 255).astype(model.manifest["frames"]["dtype"])
        print(model.decode(model.generate(frames[None], [options.text], options.max_new_tokens)[0]))
    except (OSError, ValueError) as error:
        print(f"run_onnx: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
