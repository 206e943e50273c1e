"""Copying by threads: every byte once, no buffer reused too early, errors that name the tensor, nothing left behind."""

import collections
import contextlib
import itertools
import os
import pickle
import random
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch

from moekit import checkpoint
from moekit.checkpoint import copying
from moekit.checkpoint.copying import Piece
from moekit.checkpoint.stretch import Stretch
from moekit.checkpoint.threads import switching
from moekit.checkpoint.weights import Header, Weights
from moekit.nn.transformer import Transformer

CPU = torch.device("cpu")


def piece(number: int, shape=(3, 5), source=torch.float16, target=torch.float32) -> Piece:
    values = torch.arange(number, number + torch.Size(shape).numel()).reshape(shape) / 8
    return Piece(f"file {number}: key", values.to(source), torch.full(shape, -1.0, dtype=target))


class Lazy:
    """A buffer whose device fetches as late as it may: when somebody waits, and no more than it was told to."""

    def __init__(self, size: int, log: list[str]):
        self.memory = torch.zeros(size, dtype=torch.uint8)
        self.room, self.load, self.log = self.memory.numpy(), None, log

    def send(self, load):
        assert self.load is None, "nobody waited for what was sent before"
        self.load = load

    def wait(self):
        landed = 0
        if self.load is not None:
            memory = self.memory.clone()
            memory[self.load.used * self.load.dtype.itemsize :] = 255  # was not sent
            landing = copying.Landed(memory)
            landing.expect(self.load)
            landing.arrived(self.load)
            landed = len(self.load.parts) + len(self.load.matrices)
        self.log.append(f"waited for {landed}")
        self.load = None


def staged(pieces, ring: list[Lazy]) -> None:
    """Everything through the buffers in turn, and fetched in the end."""
    for load, buffer in zip(copying.packed(pieces, len(ring[0].memory)), itertools.cycle(ring), strict=False):
        send(load, buffer)
    for buffer in ring:
        buffer.wait()


def send(load, buffer: Lazy) -> None:
    load.buffer = buffer
    copying.gather(load)
    buffer.send(load)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("size", [256, 512, 1024, 1 << 16])
def test_staged_pieces_of_all_sizes_arrive_whatever_the_buffers(buffers, size):
    shapes = [(1,), (300,), (7, 11), (0, 3), (), (64, 4), (3, 1000)]
    kinds = [(torch.float16, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
    pieces = [piece(i, shape, *kind) for i, (shape, kind) in enumerate((s, k) for s in shapes for k in kinds)]
    pieces += [piece(i, shape) for i, shape in enumerate(shapes)]  # one after the other of the same type
    staged(pieces, [Lazy(size, []) for _ in range(buffers)])
    for one in pieces:
        assert one.target.equal(one.source.to(one.target.dtype))


def test_a_buffer_holds_many_small_pieces_and_is_waited_for_before_it_is_filled_again():
    log: list[str] = []
    ring = [Lazy(1024, log), Lazy(1024, log)]
    small = [piece(i, (8,)) for i in range(12)]  # 16 bytes each, which take 256: four to a buffer
    loads = list(copying.packed(small, 1024))
    assert [[start for start, _ in load.parts] for load in loads] == [[0, 128, 256, 384]] * 3
    for load, buffer in zip(loads, [*ring, ring[0]], strict=True):
        send(load, buffer)
    assert log == ["waited for 0", "waited for 0", "waited for 4"]  # both were free, then the first was not
    assert all(one.target.equal(one.source.float()) for one in small[:4])
    assert all(one.target.eq(-1).all() for one in small[4:])


@pytest.mark.parametrize("size", [1024, 4096, 1 << 16])
@pytest.mark.parametrize("seed", range(6))
def test_neighbours_in_a_file_are_one_copy_wherever_they_lie(size, seed):
    """Tensors of a file in any order, with gaps that are aligned or not, small or large, and some of them twice."""
    rng = random.Random(seed)
    memory = np.random.default_rng(seed).integers(0, 255, 1 << 17, dtype=np.uint8)
    pieces, at = [], 2 * rng.randrange(64)
    for number in range(40):
        shape = rng.choice([(3,), (32,), (5, 7), (64, 20), (300,)])
        kind = torch.float32 if number % 11 == 10 else torch.int16
        source = Stretch(memory, at, kind, shape)
        pieces.append(Piece(f"{number}", source, torch.zeros(shape, dtype=kind)))
        at += source.nbytes + rng.choice([0, 14, 64 + -source.nbytes % 64, 64 + -source.nbytes % 64, 5000])
    pieces += [Piece("again", one.source, torch.zeros_like(one.target)) for one in pieces[3:30:7]]
    if seed % 2:
        rng.shuffle(pieces)
    staged(pieces, [Lazy(size, []) for _ in range(2)])
    for one in pieces:
        assert one.target.view(torch.uint8).equal(one.source.tensor().view(torch.uint8)), one.name


def test_what_is_not_contiguous_is_staged_in_its_own_order():
    source = torch.arange(12.0).reshape(3, 4).T
    one = Piece("transposed", source, torch.zeros(4, 3))
    staged([one], [Lazy(256, [])])
    assert one.target.equal(source)


@pytest.mark.parametrize("threads", [1, 2, 5, 50])
@pytest.mark.parametrize("load_bytes", [1, 100, 1 << 20])
def test_all_pieces_are_copied_by_any_number_of_threads(threads, load_bytes, monkeypatch):
    monkeypatch.setattr(copying, "LOAD_BYTES", load_bytes)
    before = torch.get_num_threads()
    pieces = [piece(i) for i in range(100)]
    told: list[int] = []
    me = threading.current_thread()

    interval = sys.getswitchinterval()

    def progress(count: int) -> None:
        assert threading.current_thread() is me  # a notebook draws in its own thread alone
        assert sys.getswitchinterval() < interval
        told.append(count)

    copying.copy(pieces, CPU, threads, progress)
    assert all(one.target.equal(one.source.float()) for one in pieces)
    assert sum(told) == sum(one.source.nbytes for one in pieces)
    assert torch.get_num_threads() == before and sys.getswitchinterval() == interval
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]  # and of threads to come
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


def test_blocks_of_several_threads_leave_the_interval_as_it_was():
    before = sys.getswitchinterval()
    first, second = switching(0.0005), switching(0.001)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before


def test_nothing_to_copy():
    copying.copy([], CPU, 4)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_names_the_piece_and_ends_the_threads(threads):
    def some():
        yield piece(1)
        yield Piece("model-rank-3.pt: some.key", torch.zeros(2, 3), torch.zeros(4))
        raise AssertionError("goes on after an error")

    with pytest.raises(RuntimeError, match=r"model-rank-3\.pt: some\.key cannot be copied: its shape is"):
        copying.copy(some(), CPU, threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_thread_that_fails_stops_all(threads, monkeypatch):
    """Endless pieces, more than the queue between the threads holds."""
    monkeypatch.setattr(copying, "LOAD_BYTES", 1)

    def broken(load):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(copying.Straight, "carry", staticmethod(broken))
    with pytest.raises(
        RuntimeError, match=r"file \d+: key and what follows cannot be copied: the device is gone"
    ):
        copying.copy(map(piece, itertools.count()), CPU, threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


def test_what_the_pieces_raise_is_raised():
    def broken():
        yield piece(1)
        raise ValueError("model-rank-1.pt is not readable")

    with pytest.raises(ValueError, match=r"model-rank-1\.pt is not readable"):
        copying.copy(broken(), CPU, 2)


def test_an_interrupt_ends_the_threads():
    def endless():
        while True:
            yield piece(1, (512, 1024))

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copying.copy(endless(), CPU, 2, interrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


# ------------------------------------------------------------------------------------- a checkpoint, by threads


def filled(folder, dtype, threads, plan=None):
    plan = plan or checkpoint.survey(checkpoint.find(folder))
    with torch.device("meta"):
        model = Transformer(plan.config)
    model = model.to(dtype).to_empty(device="cpu").requires_grad_(False)
    told: list[int] = []
    places = checkpoint.fill(model, plan, range(plan.config.experts), told.append, threads)
    assert len(places) == len(set(places)) > 0
    return model.state_dict(), sum(told)


class Staged:
    """As ``copying.OntoGpu`` in place of ``copying.Straight``, with ``BUFFERS`` of ``SIZE`` bytes."""

    SIZE, BUFFERS = 4096, 2

    def __init__(self):
        self.buffers = [Lazy(self.SIZE, []) for _ in range(self.BUFFERS)]

    def loads(self, pieces):
        for load, buffer in zip(
            copying.packed(pieces, self.SIZE), itertools.cycle(self.buffers), strict=False
        ):
            load.buffer = buffer
            yield load

    def in_order(self):
        return contextlib.nullcontext()

    def carry(self, load):
        copying.gather(load)

    def send(self, load):
        load.buffer.send(load)

    def finish(self):
        for buffer in self.buffers:
            buffer.wait()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_checkpoint_is_the_same_straight_and_through_buffers(reference, monkeypatch, dtype):
    folder = reference / "checkpoint"
    expected, told = filled(folder, dtype, 1)
    stored = torch.load(folder / "model-rank-2.pt", weights_only=True)["model"]
    weight = stored["decoder.layers.1.moe_layer.experts.1.fc1.weight"]
    assert expected["layers.1.moe.experts.w1"][5].equal(weight.to(dtype))

    monkeypatch.setattr(copying, "Straight", Staged)
    for threads in (1, 2, 3):
        # As many as a GPU has.
        monkeypatch.setattr(Staged, "BUFFERS", threads + copying.SPARE)
        found, told_too = filled(folder, dtype, threads)
        assert all(found[name].equal(expected[name]) for name in expected)
        assert told_too == told == sum(p.numel() * 2 for p in expected.values())


@pytest.fixture
def staged_plan(reference, tmp_path, monkeypatch):
    """Of a copy of the files that go through buffers, a plan and the model that it fills."""
    monkeypatch.setattr(copying, "Straight", Staged)
    monkeypatch.setattr(Staged, "BUFFERS", 2 + copying.SPARE)
    plan = checkpoint.survey(checkpoint.find(shutil.copytree(reference / "checkpoint", tmp_path / "files")))
    model = Transformer(plan.config).half().requires_grad_(False)
    return plan, model


def test_a_file_that_is_cut_while_buffers_are_filled_is_named(staged_plan, monkeypatch):
    plan, model = staged_plan
    path, before = plan.sources[2].path, copying.gather
    memory, cut = plan.opened[path].memory, path.stat().st_size // 4

    def late(load):
        if any(source.memory is memory for source in load.sources):
            os.truncate(path, cut)
        before(load)

    monkeypatch.setattr(copying, "gather", late)
    with pytest.raises(ValueError, match=rf"{path.name} has become shorter while it was read"):
        checkpoint.fill(model, plan, range(plan.config.experts), threads=2, verify=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("copying")]


def test_a_file_that_was_replaced_since_the_survey_is_read_as_it_is_now(staged_plan):
    """The header and the numbers are those of one and the same file."""
    plan, model = staged_plan
    path = plan.sources[2].path
    state = torch.load(path, weights_only=True)
    for key in state["model"]:
        state["model"][key] = state["model"][key] + 1
    # In another order, so that an old header would find other numbers.
    state["model"] = dict(reversed(state["model"].items()))
    with open(path.with_suffix(".new"), "wb") as file:
        torch.save(state, file)
    os.replace(path.with_suffix(".new"), path)
    checkpoint.fill(model, plan, range(plan.config.experts), threads=2)
    wanted = state["model"]["decoder.layers.1.moe_layer.experts.1.fc1.weight"]
    expert = plan.sources[2].experts[1]
    assert model.get_parameter("layers.1.moe.experts.w1")[expert].equal(wanted)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_is_one_copy_in_whatever_order_its_tensors_are_told(reference, monkeypatch, reverse):
    folder, seen = reference / "checkpoint", []

    class Whole(Staged):
        SIZE = 1 << 20

        def carry(self, load):
            seen.append([len(source) for source in load.sources])
            super().carry(load)

    expected, _ = filled(folder, torch.float16, 1)
    monkeypatch.setattr(copying, "Straight", Whole)
    plan = checkpoint.survey(checkpoint.find(folder))
    for path, weights in plan.opened.items():
        if reverse:
            told = Weights(path, weights.memory, weights.folder, weights.storage)
            for key in reversed(list(weights)):
                if isinstance(header := weights.header(key), Header):
                    told.hold(key, header)
            plan.opened[path] = told
    found, told = filled(None, torch.float16, 1, plan)
    # The shared file begins with tensors that are dropped, and its largest matrix is in it twice.
    (sources,) = seen
    assert len(sources) <= len(plan.sources) + 1 and told < sum(sources) < 1.5 * told
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_a_gpu_is_asked_for_without_one(reference, monkeypatch, threads):
    """Stand-ins for streams, events and pinned memory: a buffer is sent, recorded and waited for in this order, by few threads."""
    folder, log, pinned, empty = reference / "checkpoint", collections.defaultdict(list), [], torch.empty

    class Stream:
        def __init__(self, *_):
            self.done = False

        def wait_stream(self, _):
            pass

        def synchronize(self):
            self.done = True

    class Event:
        def __init__(self, blocking):
            assert blocking

        def query(self):
            return False

        def record(self, stream):
            assert threading.current_thread() is me
            log[self].append("sent")

        def synchronize(self):
            assert threading.current_thread().name.startswith("copying")
            log[self].append("waited")

    def with_pinned(*shape, pin_memory=False, **how):
        if pin_memory:
            pinned.append(threading.current_thread().name)
        return empty(*shape, **how)

    me, expected = threading.current_thread(), filled(folder, torch.float16, 1)[0]
    for name, stand_in in {
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "empty", with_pinned)
    monkeypatch.setattr(copying, "LOAD_BYTES", 4096)
    made = []

    def onto_gpu():
        made.append(copying.OntoGpu(CPU, False, threads + copying.SPARE))
        return made[-1]

    monkeypatch.setattr(copying, "Straight", onto_gpu)
    found, _ = filled(folder, torch.float16, threads)
    assert all(found[name].equal(expected[name]) for name in expected)
    assert made[0].stream.done and len(pinned) == len(log) == threads + copying.SPARE
    assert all(name.startswith("copying") for name in pinned)
    for steps in log.values():
        assert steps == ["sent", "waited"] * (len(steps) // 2) + ["sent"], steps


def test_a_header_is_read_once_by_who_reads_the_weights_too(reference, monkeypatch):
    read, seen = checkpoint.read, []
    for module in ("files", "plan"):
        monkeypatch.setattr(
            f"moekit.checkpoint.{module}.read", lambda path: seen.append(path.name) or read(path)
        )
    files = checkpoint.find(reference / "checkpoint")
    plan = checkpoint.survey(files)
    assert sorted(seen) == sorted(path.name for path in files.all)
    filled(None, torch.float32, 2, plan)
    # Nothing stays mapped.
    assert len(seen) == len(files.all) and not plan.opened and not files.seen
    filled(None, torch.float32, 2, plan)
    assert len(seen) == 2 * len(files.all)


def test_a_plan_travels_without_what_it_has_mapped(reference):
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    assert plan.opened
    there = pickle.loads(pickle.dumps(plan))
    assert there == plan and not there.opened
    assert len(pickle.dumps(plan)) < 10_000
    filled(None, torch.float32, 2, there)


def test_an_unreadable_tensor_is_named_with_its_file(reference):
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    path, key = plan.sources[2].path, "decoder.layers.3.moe_layer.experts.0.fc2.weight"
    plan.opened[path][key] = plan.opened[path][key][:, :5]
    with pytest.raises(RuntimeError, match=rf"{path.name}: {re.escape(key)} cannot be copied"):
        filled(None, torch.float32, 2, plan)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("threads", [1, 4])
def test_onto_a_gpu(threads):
    device = torch.device("cuda", 0)
    kinds = [(torch.float16, torch.float16), (torch.float16, torch.bfloat16), (torch.float32, torch.float16)]
    shapes = [(5,), (3072, 768), (6000, 4096)]  # the last one is larger than a buffer
    pieces = []
    for number in range(96):
        shape, (source, target) = shapes[number % 3], kinds[number // 3 % 3]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(source)
        pieces.append(Piece("x", values, torch.empty(shape, dtype=target, device=device)))
    copying.copy(pieces, device, threads)
    for one in pieces:
        assert one.target.cpu().equal(one.source.to(one.target.dtype))
