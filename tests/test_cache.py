"""The cache of tables: bounded by number and bytes, true under every mode, usable after a fork (trap 29, trap 39)."""

import os
import pickle
import signal
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_batched.runtime.lru_cache import LRUCache, hold_values


def table():
    return torch.arange(6, device="cpu").float().view(2, 3)


def under_export(get):
    class Adds(torch.nn.Module):
        def forward(self, x):
            return x + get()

    torch.export.export(Adds(), (torch.zeros(2, 3),), strict=False)


def in_mode(mode):
    def call(get):
        with mode():
            get()

    return call


MODES = {
    "export": under_export,
    "fake tensors": in_mode(FakeTensorMode),
    "inference": in_mode(torch.inference_mode),
    "a default device": in_mode(lambda: torch.device("meta")),
    "grad": lambda get: torch.func.grad(lambda x: (x * get()).sum())(torch.ones(2, 3)),
    "vmap": lambda get: torch.vmap(lambda x: x * get())(torch.ones(4, 2, 3)),
    "jvp": lambda get: torch.func.jvp(lambda x: x * get(), (torch.ones(2, 3),), (torch.ones(2, 3),)),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_value_first_needed_under_a_mode_is_a_plain_tensor_afterwards(mode):
    cache = LRUCache(4)
    MODES[mode](lambda: cache.get("table", table))
    value = cache.get("table", lambda: pytest.fail("made twice"))
    assert type(value) is torch.Tensor
    assert not value.is_inference()
    assert torch.equal(value, table())
    (value * torch.ones(2, 3, requires_grad=True)).sum().backward()  # fails for what a mode left behind


def test_the_least_recently_used_value_is_evicted_first():
    cache = LRUCache(2)
    for key in ("a", "b", "a", "c"):
        cache.get(key, lambda key=key: key)
    assert cache.get("a", lambda: "made again") == "a"
    assert cache.get("b", lambda: "made again") == "made again"


def test_values_are_bounded_by_bytes_and_one_above_the_bound_is_not_kept():
    cache = LRUCache(100, max_bytes=10, bytes_of=lambda key, value: len(value))
    assert cache.get("large", lambda: "x" * 11) == "x" * 11
    assert len(cache) == 0
    for key in range(5):
        cache.get(key, lambda: "abcd")
    assert len(cache) == 2
    assert cache.get(4, lambda: "made again") == "abcd"


def test_an_error_leaves_nothing_behind():
    cache = LRUCache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get("key", lambda: 1 / 0)
    assert cache.get("key", lambda: "value") == "value"


def test_a_copy_is_empty_and_has_the_same_bounds():
    cache = LRUCache(3, max_bytes=9, bytes_of=len_of_value)
    cache.get("key", lambda: "value")
    copy = pickle.loads(pickle.dumps(cache))
    assert (len(copy), copy.max_size, copy.max_bytes) == (0, 3, 9)


def len_of_value(key, value):
    return len(value)


def test_values_given_out_are_held_where_asked_for():
    cache = LRUCache(1)
    with hold_values() as held:
        cache.get("a", lambda: "first")
        cache.get("b", lambda: "second")
    assert held == ["first", "second"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_beside_a_thread_that_uses_the_cache_does_not_hang():
    cache = LRUCache(4)
    with cache._lock:  # as if a thread were inside
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends the process should it wait for the lock
            os._exit(0 if cache.get("key", lambda: "value") == "value" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_share_a_cache():
    cache = LRUCache(8, max_bytes=64, bytes_of=lambda key, value: 8)
    wrong = []

    def work(seed):
        for step in range(400):
            key = (seed * step) % 13
            if cache.get(key, lambda key=key: key) != key:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 8


def test_an_interrupt_at_any_point_leaves_the_count_of_bytes_right():
    def interrupt_at(point, cache):
        seen = 0

        def see(frame, event, _):
            nonlocal seen
            if event in ("call", "c_return") and frame.f_code is LRUCache._keep.__code__:
                seen += 1
                if seen == point:
                    raise KeyboardInterrupt

        sys.setprofile(see)
        try:
            cache.get("new", lambda: "value")
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    point, interrupted = 0, True
    while interrupted:
        cache = LRUCache(2, max_bytes=64, bytes_of=len_of_value)
        cache.get("a", lambda: "first")
        cache.get("b", lambda: "second")
        point += 1
        interrupted = interrupt_at(point, cache)
        assert cache._bytes == sum(size for _, size in cache._values.values())
        assert not cache._lock.locked()
    assert point > 3
