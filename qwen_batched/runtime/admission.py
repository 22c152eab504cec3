"""Which of many keys are used most: who is worth one of a few places, and who gives it up."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable

MAX_KEYS = 512
# A capture takes 0.1 to 0.5 s: about what so many calls lose that run without a graph.
USES_THAT_REPAY = 12
NEVER = -1


class Uses:
    """When keys were used last, of the `max_keys` keys used last.

    A place is worth giving to another key if that one has been used `USES_THAT_REPAY` times since its owner was last
    used twice. This is LRU-K (O'Neil, O'Neil and Weikum, SIGMOD 1993) made slow to change its mind: keys in a cycle
    never displace each other, 60 keys in random order for 32 places once in 300 uses. Yet the place of a key that is
    not used any more goes to another after `USES_THAT_REPAY` uses of that one, however common the old one was.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self.max_keys = max_keys
        self._times: OrderedDict[Hashable, deque[int]] = OrderedDict()
        self._now = 0

    def note(self, key: Hashable) -> None:
        """`key` is used now."""
        self._now += 1
        self._times.setdefault(key, deque(maxlen=USES_THAT_REPAY)).append(self._now)
        self._times.move_to_end(key)
        if len(self._times) > self.max_keys:
            self._times.popitem(last=False)

    def refuse(self, key: Hashable) -> None:
        """From now on `key` counts as unused, however often it is."""
        self._times[key] = deque(maxlen=0)

    def admit_refused(self) -> None:
        """Forgets which keys were refused."""
        for key in [key for key, times in self._times.items() if times.maxlen == 0]:
            del self._times[key]

    def is_commoner(self, key: Hashable, other: Hashable) -> bool:
        """Whether `key` is worth the place of `other`."""
        return self._last(USES_THAT_REPAY, key) > self._last(2, other)

    def least_common(self, keys: Iterable[Hashable]) -> Hashable:
        """The first to give up its place."""
        return min(keys, key=lambda key: self._last(2, key))

    def clear(self) -> None:
        """Forgets all keys."""
        self._times.clear()

    def __contains__(self, key: Hashable) -> bool:
        return self._last(1, key) != NEVER

    def _last(self, count: int, key: Hashable) -> int:
        """When `key` was used, `count` counted from the last time; `NEVER` where not so often."""
        times = self._times.get(key, ())
        return times[-count] if len(times) >= count else NEVER
