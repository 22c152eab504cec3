"""Which of a token's three positions turns each frequency of a head: 0 for time, 1 for the height, 2 for the width."""

from __future__ import annotations

from collections.abc import Callable

# Takes how many frequencies time, height and width have.
RopeRule = Callable[[tuple[int, ...]], list[int]]


def sectioned(sections: tuple[int, ...]) -> list[int]:
    """The rule of Qwen2-VL (arXiv:2409.12191, section 2.1): time's frequencies, then the height's, then the width's."""
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


def interleaved(sections: tuple[int, ...]) -> list[int]:
    """The rule of Qwen3-VL (arXiv:2511.21631): height and width have every third frequency, time the others."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for frequency in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[frequency] = axis
    return axes
