"""Graphs made ahead of time: of one call's shape, or of all that a robot or a simulator will need."""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_batched.arguments import as_int
from qwen_batched.inputs import checks
from qwen_batched.model.decoder_inputs import PACKED_TOKEN_STEPS, round_up, rounded_sizes, rows_of
from qwen_batched.training.api import Trainable

WORD = " a"  # texts of any length are made of it


class Warmup(NamedTuple):
    """What a model holds after `warmup`."""

    graphs: int  # CUDA graphs in all
    mebibytes: float  # how much more memory of the GPU is allocated than before


class WithWarmup(Trainable):
    """A model whose calls run as CUDA graphs."""

    def capture(self, images: Tensor | Sequence[Tensor] | None, texts: Sequence[str], **arguments: Any) -> None:
        """Makes the CUDA graphs of a call's shape ahead of time, so that the first real call replays them.

        Args:
            images: As for `forward`, of the shape and dtype that will come; their values do not matter.
            texts: As for `forward`, of about the length in tokens that will come.
            **arguments: Those of `forward`.

        Raises:
            TypeError, ValueError: An argument is not as described. Nothing was done.
        """
        with torch.no_grad(), self._calls.admitting_all() as refused:
            for _ in range(2):  # the first compiles kernels and packs weights
                self(images, texts, **arguments)
        _warn_of(refused)

    def warmup(
        self,
        images: Tensor | Sequence[Tensor] | None,
        *,
        max_text_tokens: int,
        max_new_tokens: int = 0,
        batch_sizes: Sequence[int] | None = None,
        progress: bool = True,
        **forward_arguments: Any,
    ) -> Warmup:
        """Makes all CUDA graphs that calls with such images and any texts will need; on a CPU none.

        No later call within these bounds compiles a kernel or captures a graph. Of `generate` that holds for prompts,
        and for greedy steps with as many new tokens; one of another kind captures its step when it first comes.

        Args:
            images: As for `forward`, of the shape and dtype that will come; their values do not matter. Give each set
                of cameras and sizes that will come to a call of its own.
            max_text_tokens: Most tokens of a text, the template's not counted.
            max_new_tokens: Most new tokens of `generate`; 0 where it is not used.
            batch_sizes: Numbers of samples that will come; None for that of the images.
            progress: Shows a progress bar on stderr.
            **forward_arguments: `camera_mask`, `template`, `resize`, `system`, `layers` and the like, as they will
                come. With a camera mask, on the host or on the GPU, all numbers of cameras are covered.

        Returns:
            How many graphs the model has, and how much memory they took.

        Raises:
            TypeError: An argument is of another type.
            ValueError: The bounds exceed the model's maximum, the number of graphs that a model keeps, or what memory
                holds. Nothing was captured, and the model works as before.
        """
        longest = as_int("max_text_tokens", max_text_tokens, 1)
        new = as_int("max_new_tokens", max_new_tokens, 0)
        if new:
            self._check_lm_head()
        batch = 1 if images is None else len(checks.check_frames(images, 1)[0])
        # The largest calls first: they show whether there is memory, and what smaller ones take lies in theirs.
        given = (batch,) if batch_sizes is None else batch_sizes
        sizes = sorted({as_int("batch_sizes", size, 1) for size in given}, reverse=True)
        if not sizes:
            raise ValueError("batch_sizes must hold at least one number, got none")
        mask = forward_arguments.pop("camera_mask", None)
        plans = [plan for size in sizes for plan in self._plans(images, size, longest, new, mask, forward_arguments)]
        room = self._calls.decoder.max_graphs
        needed = len(plans) * (2 if new else 1)  # prompts of `generate` have graphs of their own
        if needed > room:
            raise ValueError(
                f"these bounds need {needed} graphs of the decoder, and a model keeps at most {room}: lower "
                "max_text_tokens, or give fewer batch_sizes"
            )
        if not self._calls.makes_graphs(self.processor, self.device):
            return Warmup(0, 0.0)
        before = _allocated(self.device)
        self._check_memory(plans[0], forward_arguments)
        refused = self._capture_all(plans, new, forward_arguments, progress)
        _warn_of(refused)
        return Warmup(self.graph_count, (_allocated(self.device) - before) / 2**20)

    def _capture_all(
        self, plans: Sequence[tuple], new: int, arguments: dict[str, Any], progress: bool
    ) -> list[RuntimeError]:
        """Why some calls could not be captured; raises `ValueError` without any new graph where memory is too small."""
        with torch.no_grad(), self._calls.all_or_none(), self._calls.admitting_all() as refused:
            for done, plan in enumerate(tqdm(plans, desc="warmup", disable=not progress)):
                try:
                    for _ in range(2):
                        self(*plan, **arguments)
                    if new:
                        self._warm_generation(*plan, new, arguments)
                except torch.OutOfMemoryError as error:
                    refused.append(error)
                if any(isinstance(error, torch.OutOfMemoryError) for error in refused):
                    raise ValueError(
                        f"the graphs of these bounds exceed the GPU's memory, which holds the largest {done} of "
                        f"{len(plans)}: lower max_text_tokens, max_new_tokens or batch_sizes"
                    )
        return refused

    def _warm_generation(
        self, images: Any, texts: list[str], mask: Tensor | None, new: int, arguments: dict[str, Any]
    ) -> None:
        options = {name: arguments[name] for name in ("template", "resize", "system") if name in arguments}
        for _ in range(2):
            self.generate(images, texts, max_new_tokens=new, camera_mask=mask, **options)

    def _check_memory(self, plan: tuple, arguments: dict[str, Any]) -> None:
        """Raises `ValueError` where the largest call does not fit beside what is there, with the batch that does."""
        images, texts, mask = plan
        size = fitting = len(texts)
        while fitting:
            try:
                with torch.no_grad():
                    one = None if mask is None else mask[:fitting]
                    self(_repeated(images, fitting), texts[:fitting], one, cuda_graph=False, **arguments)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                fitting //= 2
        if fitting < size:
            hint = f"batch_sizes up to {fitting} fit" if fitting else "not even one sample fits"
            raise ValueError(f"calls of {size} samples exceed the GPU's memory: {hint}")

    def clear_graphs(self) -> None:
        """Forgets all CUDA graphs and gives their memory back; later calls make new ones."""
        self._calls.clear()

    @property
    def graph_count(self) -> int:
        """How many CUDA graphs there are."""
        return self._calls.graph_count

    def _plans(
        self,
        images: Tensor | Sequence[Tensor] | None,
        size: int,
        longest: int,
        new: int,
        mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> list[tuple[Any, list[str], Tensor | None]]:
        """Calls of `size` samples, one for each graph of the decoder, the largest first: images, texts, camera mask."""
        layout = {name: arguments[name] for name in ("template", "resize", "system") if name in arguments}
        frames = _repeated(images, size)
        prompts: dict[int, tuple[str, Tensor | None]] = {}
        for present in _masks(images, mask, self.device):
            texts = self._texts_by_length(_repeated(images, 1), present, longest, new, layout)
            prompts |= {length: (text, present) for length, text in texts.items()}
        plans = []
        for row in _choose(sorted(prompts), size, _knows_lengths(mask)):
            texts, masks = zip(*(prompts[length] for length in row), strict=True)
            plans.append((frames, [*texts], None if mask is None else torch.cat(masks)))
        unique = {_shape_of(self.processor, plan, layout): plan for plan in reversed(plans)}
        return sorted(unique.values(), key=lambda plan: -_shape_of(self.processor, plan, layout)[0])

    def _texts_by_length(
        self, images: Any, mask: Tensor | None, longest: int, new: int, layout: dict[str, Any]
    ) -> dict[int, str]:
        """A text for each length of a prompt that one of at most `longest` tokens leads to."""
        found: dict[int, str] = {}
        for words in itertools.count():
            text = WORD * words
            options = {"max_new_tokens": new, "device": self.device, **layout}
            prompts = self.processor.request(images, [text], mask, **options).prompts
            found.setdefault(prompts.length, text)
            most = self.config.text.max_position_embeddings
            if words == 0 and prompts.length + longest + new > most:
                sizes = f"{prompts.length} of the template, max_text_tokens={longest} and max_new_tokens={new}"
                raise ValueError(f"prompt and new tokens must fit into {most} tokens, got {sizes}")
            if prompts.length - min(found) >= longest:
                return found


def _warn_of(refused: Sequence[RuntimeError]) -> None:
    if refused:
        message = f"no CUDA graph for {len(refused)} shapes, which run without: {refused[0]}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _knows_lengths(mask: Tensor | None) -> bool:
    """Whether the host knows how long prompts with this camera mask are."""
    return mask is None or mask.device.type == "cpu"


def _repeated(images: Tensor | Sequence[Tensor] | None, size: int) -> Any:
    if images is None:
        return None
    if isinstance(images, Tensor):
        return images[:1].expand(size, *images.shape[1:])
    return [camera[:1].expand(size, *camera.shape[1:]) for camera in images]


def _masks(
    images: Tensor | Sequence[Tensor] | None, mask: Tensor | None, device: torch.device
) -> Iterator[Tensor | None]:
    """(1, V) each: every number of present cameras of each shape; all where only the device knows it."""
    if mask is None:
        yield None
        return
    cameras = images.shape[1] if isinstance(images, Tensor) else len(images or ())
    rows = len(mask) if isinstance(mask, Tensor) and mask.ndim else 1
    checks.check_camera_mask(mask, rows, cameras, device)
    if not _knows_lengths(mask):
        yield torch.ones(1, cameras, dtype=torch.bool, device=mask.device)
        return
    shapes = [None] * cameras if isinstance(images, Tensor) else [frames.shape for frames in images]
    of_a_shape = [[camera for camera, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)]
    for counts in itertools.product(*(range(len(alike), -1, -1) for alike in of_a_shape)):
        present = torch.zeros(1, cameras, dtype=torch.bool, device="cpu")
        for alike, count in zip(of_a_shape, counts, strict=True):
            present[:, alike[:count]] = True
        yield present


def _choose(lengths: Sequence[int], size: int, knows_lengths: bool) -> Iterator[list[int]]:
    """Of each of `size` samples one of `lengths`, for every sequence length and number of tokens after rounding up."""
    for longest in _last_of_each(lengths, lambda length: rows_of(size, length, not knows_lengths)):
        yield [longest] * size
    if knows_lengths and size > 1:
        yield from _choose_ragged(lengths, size)


def _choose_ragged(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Those where the samples differ in length. Lengths may have gaps, as those of prompts with fewer cameras do."""
    for most in _last_of_each(lengths, lambda length: rows_of(size, length, True)):
        fitting = [length for length in lengths if length <= most]
        longest = [length for length in fitting if rows_of(size, length, True) == rows_of(size, most, True)]
        sums = [1]  # bit t of sums[k]: k of the lengths that fit add up to t
        for _ in range(size - 1):
            sums.append(_moved(sums[-1], fitting))
        totals, found = _moved(sums[-1], longest), set()
        for total in range(size * most, 0, -1):
            rounded = round_up(total, PACKED_TOKEN_STEPS)
            if rounded in found or not _has(totals, total):
                continue
            # The longest that there can be, then the shortest: all are the same only where nothing else adds up to it.
            row = [max(length for length in longest if _has(sums[-1], total - length))]
            for left in reversed(sums[:-1]):
                rest = total - sum(row)
                row.append(min(length for length in fitting if _has(left, rest - length)))
            if len({*row}) > 1:
                found.add(rounded)
                yield row


def _moved(bits: int, lengths: Sequence[int]) -> int:
    """The sums that come of adding one of the lengths to one of the sums that `bits` stands for."""
    return functools.reduce(operator.or_, (bits << length for length in lengths))


def _has(bits: int, total: int) -> bool:
    return total >= 0 and bool(bits >> total & 1)


def _last_of_each(counts: Sequence[int], rounded: Callable[[int], int]) -> list[int]:
    """The largest of the counts that are rounded up to the same."""
    return sorted({rounded(count): count for count in counts}.values(), reverse=True)


def _shape_of(processor: Any, plan: tuple, layout: dict[str, Any]) -> tuple[int, int, bool]:
    """Tokens and rows of a call after rounding up."""
    images, texts, mask = plan
    prompts = processor.request(images, texts, mask, **layout).prompts
    size = len(texts)
    is_padded = prompts.tokens != size * prompts.length
    rows, tokens = rounded_sizes(size, prompts.length, prompts.tokens, is_padded)
    return tokens, rows, is_padded
