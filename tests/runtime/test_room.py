"""Tensors of several sizes in one buffer: what stands behind them is as if the buffer were new."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qwen_batched.runtime.cuda_graphs import CudaGraphs
from qwen_batched.runtime.room import Room

SIZE = 6
CPU = torch.device("cpu")


def value(size, dim, dtype=torch.int64, number=1):
    shape = [2, 3, 4]
    shape[dim] = size
    return torch.full(shape, number).to(dtype)


@given(
    sizes=st.lists(st.integers(1, SIZE), min_size=1, max_size=8),
    dim=st.integers(0, 2),
    case=st.sampled_from([(torch.int64, -100), (torch.int64, -1), (torch.bool, 0), (torch.float32, 0)]),
)
def test_a_buffer_holds_what_padding_gives(sizes, dim, case):
    (dtype, fill), last = case, None
    room = Room(dim, SIZE, fill)
    buffer = value(SIZE, dim, dtype, 77)
    for number, size in enumerate(sizes, start=1):
        x = value(size, dim, dtype, number)
        assert room.shape(x) == buffer.shape
        room.write(x, buffer, last)
        assert torch.equal(buffer, room.padded(x))
        assert torch.equal(buffer.narrow(dim, 0, size), x)
        assert (buffer.narrow(dim, size, SIZE - size) == fill).all()
        last = size


@pytest.mark.parametrize("size", [2, SIZE])
def test_room_that_is_never_read_is_not_filled(size):
    room, x, buffer = Room(1, SIZE), value(size, 1), value(SIZE, 1, number=77)
    assert room.padded(x) is x
    room.write(x, buffer, None)
    assert torch.equal(buffer[:, :size], x) and (buffer[:, size:] == 77).all()


def test_inputs_of_all_sizes_that_fit_share_a_graph(fake):
    graphs, module = CudaGraphs(), nn.Identity()
    room, seen = Room(1, SIZE, -1), []

    def function(x, y):
        seen.append(x.shape)
        return x * y

    def run(size, rooms):
        with torch.no_grad():
            return graphs.run([module], "key", function, value(size, 1), torch.tensor(3), device=CPU, rooms=rooms)

    for size in (4, 2, 6, 1, 3, 2):
        want = torch.cat((value(size, 1) * 3, value(SIZE - size, 1) * -3), dim=1)
        assert torch.equal(run(size, [room, None]), want)
    assert fake.captured == len(graphs) == 1 and fake.replayed == 5 and {*seen} == {(2, SIZE, 4)}
    assert run(2, None).shape == (2, 2, 4), "without room it is another call"
    assert run(SIZE, None).shape == (2, SIZE, 4) and len(graphs) == 1


def test_an_interrupted_copy_leaves_nothing_of_the_value_before(fake, monkeypatch):
    graphs, module = CudaGraphs(), nn.Identity()

    def run(size):
        with torch.no_grad():
            x, rooms = value(size, 1, number=size), [Room(1, SIZE, -1)]
            return graphs.run([module], "key", torch.clone, x, device=CPU, rooms=rooms)

    for _ in range(3):
        run(1)
    write = Room.write

    def interrupted(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Room, "write", interrupted)
        run(4)
    assert (run(2)[:, 2:] == -1).all()
