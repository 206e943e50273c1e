"""Copying by threads: every byte once, no buffer reused too early, errors that name the tensor, nothing left behind."""

import threading

import pytest
import torch

from moekit import copying
from moekit.copying import Piece, Staging

CPU = torch.device("cpu")


def piece(number: int, shape=(3, 5), source=torch.float16, target=torch.float32) -> Piece:
    values = torch.arange(number, number + torch.Size(shape).numel()).reshape(shape) / 8
    return Piece(f"file {number}: key", values.to(source), torch.full(shape, -1.0, dtype=target))


class Lazy:
    """A buffer whose device fetches as late as it may: when somebody waits, and only what was closed."""

    def __init__(self, size: int, log: list[str]):
        self.memory = torch.zeros(size, dtype=torch.uint8)
        self.sent, self.pending, self.log = [], [], log

    def send(self, part, target):
        self.sent.append((part, target))

    def close(self):
        self.pending, self.sent = self.pending + self.sent, []

    def wait(self):
        for part, target in self.pending:
            target.copy_(part)
        self.log.append(f"waited for {len(self.pending)}")
        self.pending = []


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("size", [256, 512, 1024, 1 << 16])
def test_staged_pieces_of_all_sizes_arrive_whatever_the_buffers(buffers, size):
    log: list[str] = []
    ring = [Lazy(size, log) for _ in range(buffers)]
    staging = Staging(ring)
    shapes = [(1,), (300,), (7, 11), (0, 3), (), (64, 4), (3, 1000)]
    kinds = [(torch.float16, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
    pieces = [piece(i, shape, *kind) for i, (shape, kind) in enumerate((s, k) for s in shapes for k in kinds)]
    for one in pieces:
        staging.carry(one)
    for buffer in ring:
        buffer.close()
        buffer.wait()
    for one in pieces:
        assert one.target.equal(one.source.to(one.target.dtype)), one.name


def test_a_buffer_holds_many_small_pieces_and_is_waited_for_before_it_is_filled_again():
    log: list[str] = []
    staging = Staging([Lazy(1024, log), Lazy(1024, log)])
    small = [piece(i, (8,)) for i in range(12)]  # 16 bytes each, which take 256: four to a buffer
    for one in small:
        staging.carry(one)
    assert log == ["waited for 0", "waited for 4"]  # the second buffer was free, the first had to be fetched
    assert all(one.target.equal(one.source.float()) for one in small[:4])
    assert all(one.target.eq(-1).all() for one in small[4:])


def test_what_is_not_contiguous_is_staged_in_its_own_order():
    log: list[str] = []
    source = torch.arange(12.0).reshape(3, 4).T
    one = Piece("transposed", source, torch.zeros(4, 3))
    buffer = Lazy(256, log)
    Staging([buffer]).carry(one)
    buffer.close()
    buffer.wait()
    assert one.target.equal(source)


@pytest.mark.parametrize("threads", [1, 2, 5, 50])
def test_all_groups_are_copied_by_any_number_of_threads(threads):
    before = torch.get_num_threads()
    groups = [[piece(10 * g + i) for i in range(g % 4)] for g in range(20)]
    told: list[int] = []
    me = threading.current_thread()

    def progress(count: int) -> None:
        assert threading.current_thread() is me  # a notebook draws in its own thread alone
        told.append(count)

    copying.copy([lambda g=g: g for g in groups], CPU, threads, progress)
    pieces = [one for group in groups for one in group]
    assert all(one.target.equal(one.source.float()) for one in pieces)
    assert sum(told) == sum(one.source.nbytes for one in pieces)
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]  # and of threads to come
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


def test_nothing_to_copy():
    copying.copy([], CPU, 4)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_names_the_piece_and_stops_the_others(threads):
    after: list[str] = []

    def good():
        for i in range(1000):
            yield piece(i)
        after.append("all")

    def bad():
        yield piece(1)
        yield Piece("model-rank-3.pt: some.key", torch.zeros(2, 3), torch.zeros(4))

    with pytest.raises(RuntimeError, match=r"model-rank-3\.pt: some\.key cannot be copied"):
        copying.copy([bad, *[good] * 50], CPU, threads)
    assert len(after) < 50
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


def test_what_a_group_raises_is_raised():
    def broken():
        raise ValueError("model-rank-1.pt is not readable")
        yield

    with pytest.raises(ValueError, match=r"model-rank-1\.pt is not readable"):
        copying.copy([broken], CPU, 2)


def test_an_interrupt_ends_the_threads():
    def endless():
        while True:
            yield piece(1, (512, 1024))

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copying.copy([endless, endless], CPU, 2, interrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


def test_a_staged_piece_of_another_shape_is_an_error():
    staging = Staging([Lazy(256, [])])
    with pytest.raises(RuntimeError, match=r"its shape is \[2, 3\], expected \[3, 2\]"):
        staging.carry(Piece("x", torch.zeros(2, 3), torch.zeros(3, 2)))
