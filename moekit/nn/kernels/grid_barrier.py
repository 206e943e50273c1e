"""A barrier of all programs of one kernel: what a program wrote before it, every program can read behind it.

All programs have to run at the same time, so there is at most one for each place on the GPU. A counter of 64 bits in the
GPU's memory goes up by one at each arrival and is never reset, so a CUDA graph can replay the kernel. A program that
waits too long sets the bit :data:`GAVE_UP`. The counter is then greater than what any wait asks for, so that all waits end.
"""

from __future__ import annotations

import weakref

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# The most looks at the counter in a wait: about a minute.
LOOKS = tl.constexpr(150_000_000)
GAVE_UP = 1 << 62
LIMIT = tl.constexpr(GAVE_UP)

# The number of the thread that speaks for a program, which is 0, and for a warp.
OF_A_PROGRAM, OF_A_WARP = "%tid.x", "%laneid"
# One thread adds 1 to the counter at $1, after all that the threads it speaks for wrote.
_ARRIVE = """
    {
    .reg .pred one;
    .reg .b32 thread;
    mov.u32 thread, THREAD;
    setp.eq.u32 one, thread, 0;
    @one red.release.gpu.global.add.u64 [$1], 1;
    mov.u32 $0, 0;
    }
    """
# One thread looks at the counter at $1 until it is $2 or more, $3 times at most; then it sets the bit 62.
_WAIT = """
    {
    .reg .pred ends;
    .reg .b32 thread, looks;
    .reg .b64 count;
    mov.u32 thread, THREAD;
    setp.ne.u32 ends, thread, 0;
    @ends bra done;
    mov.u32 looks, 0;
    look:
    ld.acquire.gpu.global.b64 count, [$1];
    setp.ge.s64 ends, count, $2;
    @ends bra done;
    add.u32 looks, looks, 1;
    setp.lt.u32 ends, looks, $3;
    @ends bra look;
    red.relaxed.gpu.global.or.b64 [$1], 0x4000000000000000;
    done:
    bar.warp.sync 0xffffffff;
    mov.u32 $0, 0;
    }
    """


def spoken(asm: str, thread: str) -> tl.constexpr:
    return tl.constexpr(asm.replace("THREAD", thread))


ARRIVE, WAIT = spoken(_ARRIVE, OF_A_PROGRAM), spoken(_WAIT, OF_A_PROGRAM)
ARRIVE_OF_A_WARP, WAIT_OF_A_WARP = spoken(_ARRIVE, OF_A_WARP), spoken(_WAIT, OF_A_WARP)


_counters: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def counter(model: nn.Module, device: torch.device) -> Tensor:
    """[1] int64, of all of the model's kernels with a barrier: each has the same number of programs, and one runs at a time."""
    count = _counters.get(model)
    if count is None or count.device != device:
        count = _counters[model] = torch.zeros(1, dtype=torch.long, device=device)
    return count


def forget(model: nn.Module) -> None:
    """Know of no wait that took too long. Graphs that were captured use the counter on, so it stays where it is."""
    if model in _counters:
        _counters[model].zero_()


def check(model: nn.Module) -> None:
    """Raise an error if a wait has taken too long since the last check; it waits for the device."""
    count = _counters.get(model)
    if count is not None and int(count) >= GAVE_UP:
        count.zero_()
        raise RuntimeError(
            "a kernel's programs did not all run at the same time; expected a GPU that does nothing else at that time: "
            "free it of other work, or choose another backend"
        )


@triton.jit
def begun(count, PROGRAMS: tl.constexpr):
    """What the counter was when this kernel began; a program calls it before it arrives for the first time."""
    # The others may have arrived already, this program has not. After a wait that gave up, no other wait takes long.
    now = tl.load(count, volatile=True)
    return tl.where(now < LIMIT, now // PROGRAMS * PROGRAMS, 0)


@triton.jit
def arrive(count, PROGRAMS: tl.constexpr):
    """Say that this program has written all that the others wait for."""
    if PROGRAMS > 1:
        tl.debug_barrier()
        tl.inline_asm_elementwise(ARRIVE, "=r,l", [count.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(count, target, PROGRAMS: tl.constexpr):
    """Wait until all programs have arrived once more since the counter was ``target``, and return what it is then."""
    target += PROGRAMS
    if PROGRAMS > 1:
        tl.inline_asm_elementwise(
            WAIT, "=r,l,l,r", [count.to(tl.int64), target, LOOKS], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()
    return target
