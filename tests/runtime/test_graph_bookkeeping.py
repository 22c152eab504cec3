"""When a call is run, captured and replayed, and what is forgotten: on a CPU, with graphs that only pretend."""

import copy
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_batched.runtime import cuda_graphs
from qwen_batched.runtime.admission import USES_THAT_REPAY
from qwen_batched.runtime.cuda_graphs import CudaGraphs, OutdatedError, deferring_checks, make_all
from tests.support import photos


class Key:
    """An object as a key, like a step's decoding."""


def run(graphs, module, key, function, *inputs):
    with torch.no_grad():
        return graphs.run([module], key, function, *inputs, device=torch.device("cpu"))


def run_twice(*arguments):
    """So that there is a graph."""
    for _ in range(2):
        run(*arguments)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 3).requires_grad_(False)


def test_the_first_call_runs_the_second_is_captured_the_rest_replay(fake, linear):
    graphs = CudaGraphs()
    for index in range(5):
        x = torch.full((2, 3), float(index))
        assert torch.equal(run(graphs, linear, "key", linear, x), linear(x))
        assert fake.captured == (index > 0)
        assert fake.replayed == index
    assert len(graphs) == 1


def test_trap25_results_are_copies(fake, linear):
    graphs = CudaGraphs()
    x = [torch.full((2, 3), float(index)) for index in range(6)]
    results = [run(graphs, linear, "key", linear, value) for value in x]
    for result, value in zip(results, x, strict=True):
        assert torch.equal(result, linear(value))
    results[-1].zero_()
    assert torch.equal(run(graphs, linear, "key", linear, x[3]), linear(x[3]))


def test_checks_are_made_before_anything_runs_and_left_to_the_caller_behind_a_replay(fake, linear):
    graphs, x, log = CudaGraphs(), torch.ones(2, 3), []

    def function(x):
        log.append("ran")
        return linear(x)

    def check():
        log.append("checked")

    def logged(stateful=False):
        log.clear()
        checks = [check]
        with torch.no_grad():
            graphs.run([linear], "key", function, x, device=torch.device("cpu"), checks=checks, stateful=stateful)
        log.append(len(checks))
        make_all(checks)
        return log[:]

    assert logged() == ["checked", "ran", 0]
    assert logged() == ["ran", "ran", 2, "checked"]  # captured, and replayed, where these graphs run it too
    assert logged() == ["ran", 2, "checked"]
    assert logged(stateful=True) == ["ran", 1, "checked"]  # of which the modules are looked at before
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, out: None)
    try:
        assert logged() == ["checked", "ran", 0]  # with a hook on every module no graph is replayed
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_outdated_outputs_is_none_and_others_pass(error):
    def outdated():
        raise OutdatedError

    def run(checks):
        given.append(checks)
        if checks is None:
            return "again"
        checks += added
        raise error("first")

    given, added = [], [lambda: None]
    with pytest.raises(error, match="first"):
        deferring_checks(run)
    added.append(outdated)
    if error is ValueError:
        assert deferring_checks(run) == "again"
    else:
        with pytest.raises(error):
            deferring_checks(run)


def test_a_check_is_of_the_modules_as_they_were_when_the_graph_was_replayed(fake, linear):
    graphs, checks = CudaGraphs(), []
    run_twice(graphs, linear, "key", linear, torch.ones(2, 3))

    def replay():
        checks.clear()
        with torch.no_grad():
            graphs.run([linear], "key", linear, torch.ones(2, 3), device=torch.device("cpu"), checks=checks)
        return checks

    (check,) = replay()
    check()
    (check,) = replay()
    linear.bias.data = linear.bias + 1
    with pytest.raises(OutdatedError):
        check()
    assert len(graphs) == 0
    run_twice(graphs, linear, "key", linear, torch.ones(2, 3))  # another snapshot, of what is there now
    with pytest.raises(OutdatedError):
        check()
    assert len(graphs) == 1 and replay()[0]() is None


def test_inputs_are_not_written_to(fake, linear):
    graphs = CudaGraphs()
    x = [torch.full((2, 3), float(index)) for index in range(4)]
    for value in x:
        run(graphs, linear, "key", linear, value)
    assert [float(value[0, 0]) for value in x] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (("key", "other"), x),
        lambda x: ("key", x[:1]),
        lambda x: ("key", x.view(3, 2)),
        lambda x: ("key", x.double()),
    ],
    ids=["key", "batch", "shape", "dtype"],
)
def test_trap26_another_key_shape_or_dtype_is_another_graph(fake, change):
    graphs, module = CudaGraphs(), nn.Identity()
    x = torch.randn(2, 3)
    for _ in range(3):
        run(graphs, module, "key", lambda x: x * 2, x)
    key, y = change(x)
    for _ in range(2):
        assert torch.equal(run(graphs, module, key, lambda x: x * 3, y), y * 3)
    assert len(graphs) == 2


def test_the_matmul_precision_is_part_of_the_key(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(2, 3)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            run_twice(graphs, linear, "key", linear, x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(graphs) == 2


@pytest.mark.skipif(not cuda_graphs.NAMED_PRECISIONS, reason="needs the precision settings of PyTorch 2.9")
def test_precisions_set_by_their_new_names_are_part_of_the_key(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(2, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            run_twice(graphs, linear, "key", linear, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(graphs) == 2


def test_the_choice_of_attention_kernels_is_part_of_the_key(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(2, 3)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            run_twice(graphs, linear, "key", linear, x)
    assert len(graphs) == 3


def test_calls_that_a_graph_would_answer_wrongly_are_run(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(4, 2, 3)
    for value in x:
        run(graphs, linear, "key", linear, value)
    mapped = torch.func.vmap(lambda value: run(graphs, linear, "key", linear, value))(x)
    assert torch.allclose(mapped, linear(x))
    with forward_ad.dual_level():
        out = run(graphs, linear, "key", linear, forward_ad.make_dual(x[0], torch.ones_like(x[0])))
        assert forward_ad.unpack_dual(out).tangent is not None


def test_a_graph_gives_way_to_a_shape_that_is_used_much_more(fake, linear):
    graphs = CudaGraphs(max_graphs=2)
    a, b, c = (torch.randn(size, 3) for size in (1, 2, 4))
    for x in (a, a, b, b, a, c, c, *[c, a, b] * 20):
        assert torch.equal(run(graphs, linear, "key", linear, x), linear(x))
    assert fake.captured == len(graphs) == 2, "c is no commoner than a and b"
    for x in (*[c, a] * 20, c):
        assert torch.equal(run(graphs, linear, "key", linear, x), linear(x))
    assert fake.captured == 3
    assert len(graphs) == 2
    replayed = fake.replayed
    for x in (a, c):
        run(graphs, linear, "key", linear, x)
    assert fake.replayed == replayed + 2, "it was b that gave way"
    assert torch.equal(run(graphs, linear, "key", linear, b), linear(b))
    assert fake.captured == 3


def displace(graphs, linear):
    """Has the first graph of two take the only place, then the other; the last call of all captured it."""
    a, b = torch.randn(1, 3), torch.randn(2, 3)
    for x in (a, a, a, *[b] * (1 + USES_THAT_REPAY)):
        assert torch.equal(run(graphs, linear, "key", linear, x), linear(x))
    return b


def test_where_all_are_admitted_the_second_call_is_captured_whoever_gives_way(fake, linear):
    graphs = CudaGraphs(max_graphs=2)
    for size in (1, 2):
        run_twice(graphs, linear, "key", linear, torch.randn(size, 3))
    with graphs.admitting_all([]):
        run_twice(graphs, linear, "key", linear, torch.randn(3, 3))
    assert fake.captured == 3
    assert len(graphs) == 2
    run_twice(graphs, linear, "key", linear, torch.randn(4, 3))
    assert fake.captured == 3


def test_where_all_are_admitted_refusals_are_gathered_and_can_be_forgotten(fake, linear):
    graphs, kept, x = CudaGraphs(), torch.randn(1, 3), torch.randn(2, 3)
    run_twice(graphs, linear, "key", linear, kept)
    before, refused = graphs.keys(), []
    with warnings.catch_warnings(), graphs.admitting_all(refused):
        warnings.simplefilter("error")
        run_twice(graphs, linear, "other", linear, x)
        fake.error = torch.OutOfMemoryError("full")
        run_twice(graphs, linear, "key", linear, x)
    assert refused == [fake.error]
    fake.error = None
    assert len(graphs) == 2
    graphs.keep_only(before)
    assert graphs.keys() == before
    run_twice(graphs, linear, "key", linear, x)
    assert len(graphs) == 2, "what could not be captured is tried again"


def test_a_call_is_captured_by_a_thread_that_has_run_it_only(fake, linear):
    """Another thread's first call makes handles and plans of its own, which a capture does not allow: it runs first.

    Servers have a thread for each request, which makes one call: so this is captured right behind it.
    """
    graphs, x, calls = CudaGraphs(), torch.randn(2, 3), []

    def function(x):
        calls.append(fake.capturing)
        return linear(x)

    run(graphs, linear, "key", function, x)
    seen = []
    for _ in range(3):
        other = threading.Thread(target=lambda: seen.append(run(graphs, linear, "key", function, x)))
        other.start()
        other.join()
        seen.append((fake.captured, fake.replayed))
    assert seen[1::2] == [(1, 0), (1, 1), (1, 2)]
    assert calls[:3] == [False, False, True], "run here, run there, then captured there"
    assert all(torch.equal(out, linear(x)) for out in seen[::2])


@pytest.mark.parametrize("error", [RuntimeError("invalidated"), torch.OutOfMemoryError("full")])
def test_a_thread_whose_capture_behind_its_call_fails_has_its_result_and_one_warning(fake, linear, error):
    graphs, x, seen = CudaGraphs(), torch.randn(2, 3), []
    run(graphs, linear, "key", linear, x)
    fake.error = error

    def call():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen.append((run(graphs, linear, "key", linear, x), len(caught)))

    for _ in range(2):
        other = threading.Thread(target=call)
        other.start()
        other.join()
    assert [warned for _, warned in seen] == [1, 0]
    assert all(torch.equal(out, linear(x)) for out, _ in seen)
    assert len(graphs) == 0


def test_what_a_thread_has_run_keeps_nothing_alive_and_is_bounded(fake, linear, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_RAN", 3)
    graphs, key = CudaGraphs(), Key()
    run(graphs, linear, key, linear, torch.randn(2, 3))
    gone = weakref.ref(key)
    graphs.forget()
    del key
    assert gone() is None
    for size in range(1, 20):
        run(graphs, linear, "key", linear, torch.randn(size, 3))
        assert len(graphs._ran_here()) <= 4


def test_a_thread_that_admits_all_does_so_for_itself_alone(fake, linear):
    graphs = CudaGraphs(max_graphs=1)
    run_twice(graphs, linear, "key", linear, torch.randn(1, 3))
    with graphs.admitting_all([]):
        other = threading.Thread(target=lambda: run_twice(graphs, linear, "key", linear, torch.randn(2, 3)))
        other.start()
        other.join()
        assert fake.captured == 1
        run_twice(graphs, linear, "key", linear, torch.randn(3, 3))
    assert fake.captured == 2


def test_modules_are_prepared_once_before_anything_is_captured_and_again_after_a_change(fake, linear):
    prepared = []
    graphs = CudaGraphs(prepare=lambda *modules: prepared.append((modules, fake.captured)))
    for size in (1, 1, 2, 2, 1):
        run(graphs, linear, "key", linear, torch.randn(size, 3))
    assert prepared == [((linear,), 0)]
    linear.weight.data = linear.weight.data.clone() * 2
    for size in (1, 2, 2):
        run(graphs, linear, "key", linear, torch.randn(size, 3))
    assert prepared == [((linear,), 0), ((linear,), 2)]


def test_what_preparing_moves_is_in_the_snapshot(fake, linear):
    def prepare(module):
        module.weight.data = module.weight.data.clone()

    graphs = CudaGraphs(prepare=prepare)
    for _ in range(5):
        run(graphs, linear, "key", linear, torch.randn(2, 3))
    assert fake.captured == 1


def test_modules_that_cannot_be_captured_are_not_prepared(fake, linear):
    linear.register_forward_hook(lambda module, args, out: None)
    graphs = CudaGraphs(prepare=lambda *modules: pytest.fail("prepared"))
    run(graphs, linear, "key", linear, torch.randn(2, 3))


def test_a_displaced_graph_goes_at_once_where_the_device_is_through_with_it(fake, linear):
    graphs = CudaGraphs(max_graphs=1)
    displace(graphs, linear)
    assert fake.captured == 2
    assert len(graphs) == fake.living() == 1
    assert fake.waited == 0


def test_a_displaced_graph_that_still_runs_goes_at_a_later_call_and_nobody_waits(fake, linear):
    fake.busy = True
    graphs = CudaGraphs(max_graphs=1)
    x = displace(graphs, linear)
    assert len(graphs) == 1
    assert fake.living() == 2
    fake.busy = False
    run(graphs, linear, "key", linear, x)
    assert fake.living() == 1
    assert fake.waited == 0


@pytest.mark.parametrize("way", ["forget", "clear"])
def test_forgetting_waits_for_graphs_that_still_run(fake, linear, way):
    """Of displaced ones too: what they read, the snapshot's, goes with them."""
    fake.busy = True
    graphs = CudaGraphs(max_graphs=1)
    displace(graphs, linear)
    getattr(graphs, way)()
    assert fake.waited == 2
    assert fake.living() == 0


def test_out_of_memory_waits_for_displaced_graphs_before_it_tries_again(fake, linear):
    """They may hold just what is missing."""
    fake.busy = True
    graphs = CudaGraphs(max_graphs=1)
    a, b = torch.randn(1, 3), torch.randn(2, 3)
    for x in (a, a, *[b] * USES_THAT_REPAY):
        run(graphs, linear, "key", linear, x)
    errors = [torch.OutOfMemoryError("CUDA out of memory")]
    fake.before_capture = lambda: errors and raise_(errors.pop())
    run(graphs, linear, "key", linear, b)
    assert fake.captured == 2
    assert fake.waited == 1
    assert fake.living() == 1


def raise_(error):
    raise error


def test_a_shape_that_cannot_be_captured_is_tried_once_and_leaves_the_others_theirs(fake, linear):
    graphs = CudaGraphs(max_graphs=2)
    a, b = torch.randn(1, 3), torch.randn(2, 3)
    for _ in range(3):
        run(graphs, linear, "key", linear, a)
    fake.error = RuntimeError("not in a capture")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            assert torch.equal(run(graphs, linear, "key", linear, b), linear(b))
    assert len(caught) == 1
    fake.error = None
    replayed = fake.replayed
    run(graphs, linear, "key", linear, a)
    assert fake.replayed == replayed + 1


def test_where_warnings_are_errors_the_call_is_made_before_the_warning(fake, linear):
    graphs, calls = CudaGraphs(), []

    def function(x):
        calls.append(x)
        return linear(x)

    x = torch.randn(1, 3)
    run(graphs, linear, "key", function, x)
    fake.error = RuntimeError("not in a capture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            run(graphs, linear, "key", function, x)
    made = len(calls)
    assert torch.equal(run(graphs, linear, "key", function, x), linear(x))
    assert len(calls) == made + 1, "it was not tried again"


def test_inputs_of_other_strides_give_right_results(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(3, 3)
    for value in (x, x, x.t(), x[:, :1].expand(3, 3), torch.randn(6, 6)[::2, ::2]):
        assert torch.equal(run(graphs, linear, "key", linear, value), linear(value))


def test_many_shapes_stay_bounded(fake, linear):
    graphs = CudaGraphs(max_graphs=3)
    for size in [*range(1, 20)] * 2 + [20] * 20:
        run(graphs, linear, "key", linear, torch.randn(size, 3))
        assert len(graphs) <= 3
    assert len(graphs) == fake.living() == 3


MOVES = {
    "data": lambda linear: setattr(linear.weight, "data", linear.weight.data.clone() * 2),
    "parameter": lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(3, 3), requires_grad=False)),
    "hook": lambda linear: linear.register_forward_hook(lambda module, args, out: out * 2),
}


@pytest.mark.parametrize("calls_before", [1, 2, 3])
@pytest.mark.parametrize("name", MOVES)
def test_trap26_after_a_change_the_first_call_runs_before_anything_is_captured(fake, linear, name, calls_before):
    """Weights are packed and kernels compiled in a call that runs; in a capture they must not be."""
    graphs, x = CudaGraphs(), torch.randn(2, 3)
    for _ in range(calls_before):
        run(graphs, linear, "key", linear, x)
    MOVES[name](linear)
    inside = []
    captured = fake.captured
    function = lambda x: inside.append(fake.capturing) or linear(x)  # noqa: E731
    assert torch.equal(run(graphs, linear, "key", function, x), linear(x))
    assert inside == [False]
    assert fake.captured == captured


def test_trap26_after_a_change_another_shapes_second_call_is_not_captured(fake, linear):
    graphs, x, y = CudaGraphs(), torch.randn(2, 3), torch.randn(4, 3)
    for value in (x, x, x, y):
        run(graphs, linear, "key", linear, value)
    linear.weight.data = linear.weight.data.clone() * 2
    captured = fake.captured
    assert torch.equal(run(graphs, linear, "key", linear, y), linear(y))
    assert fake.captured == captured


def test_a_first_call_that_failed_is_repeated_before_anything_is_captured(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(2, 3)

    def fails(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(graphs, linear, "key", fails, x)
    assert torch.equal(run(graphs, linear, "key", linear, x), linear(x))
    assert fake.captured == 0


def test_running_out_of_memory_in_the_capture_falls_back_with_one_warning(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(2, 3)
    fake.error = torch.OutOfMemoryError("CUDA out of memory")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            assert torch.equal(run(graphs, linear, "key", linear, x), linear(x))
    assert len(caught) == 1
    assert "memory" in str(caught[0].message)


def test_trap29_a_graph_captured_in_inference_mode_runs_outside_it(fake, linear):
    graphs, x = CudaGraphs(), torch.randn(2, 3)
    with torch.inference_mode():
        for _ in range(3):
            run(graphs, linear, "key", lambda x: x * 2, x)
    with torch.no_grad():
        out = run(graphs, linear, "key", lambda x: x * 2, x)
    assert torch.equal(out, x * 2)
    assert not out.is_inference()


def prepare_nothing(*modules):
    pass


def test_a_copy_begins_anew(fake, linear):
    graphs = CudaGraphs(max_graphs=5, prepare=prepare_nothing)
    for _ in range(3):
        run(graphs, linear, "key", linear, torch.randn(2, 3))
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert (len(other), other.max_graphs, other._prepare) == (0, 5, prepare_nothing)


@pytest.mark.parametrize("way", ["forget", "clear"])
def test_nothing_forgotten_is_kept_alive(fake, linear, way):
    """A key may hold much: a step of generation's holds the cache."""
    graphs, keys = CudaGraphs(), [nn.Linear(2, 2) for _ in range(3)]
    for key in keys:
        run_twice(graphs, linear, key, linear, torch.randn(2, 3))
    alive = list(map(weakref.ref, keys))
    getattr(graphs, way)()
    del keys, key
    assert [reference() for reference in alive] == [None] * 3


def test_a_model_on_the_cpu_makes_no_graph(load):
    model = load()
    with torch.no_grad():
        for _ in range(3):
            model.encode_images(photos(1, 1, 28, 28))
    assert len(model._calls.tower) == 0
