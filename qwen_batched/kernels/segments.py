"""Segments: the stretches of tokens within which attention happens. Windows and whole images are both segments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """`count` equal segments of `length` tokens each, back to back from token `start` of an image."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length
