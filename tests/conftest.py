import contextlib
import importlib
import os
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import triton_interpreter

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items):
    """The browser comes last, when the run beside this one is over: a kernel that starts while three programs compute takes minutes."""
    items.sort(key=lambda item: "browser" in item.path.parts)


def pytest_configure(config: pytest.Config) -> None:
    # Whatever ends a run, fixtures take down what they have started. Shells start a program in the background with the interrupt
    # key ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Pictures depend on no list of fonts that an earlier run on this machine left behind.
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="moekit-matplotlib-")
    _import_triton()


def _import_triton() -> None:
    """Import Triton, where it is installed; without a GPU, for its interpreter.

    A variable says for each kernel whether it is interpreted, at the kernel's definition. Triton's own functions, which kernels
    call, are defined when Triton is first imported: by any test file, or by another package.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")
        if not torch.cuda.is_available():
            triton_interpreter.replace_once()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ.pop("MPLCONFIGDIR"), ignore_errors=True)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Recordings of what fairseq's moe branch computes on a tiny checkpoint (see its README)."""
    return DATA / "reference"


TRIED: defaultdict[str, Counter[str]] = defaultdict(Counter)


@pytest.fixture(scope="session")
def counted() -> Callable[..., None]:
    """``counted(what, outcome, times=1)``: the run ends with a table of what was tried and what came of it."""

    def count(what: str, outcome: str, times: int = 1) -> None:
        TRIED[what][outcome] += times

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        terminalreporter.section("inputs tried and faults injected")
    for what, outcomes in TRIED.items():
        said = ", ".join(f"{times:,} {outcome}" for outcome, times in outcomes.most_common())
        terminalreporter.line(f"{what}: {outcomes.total():,} tried; {said}")
