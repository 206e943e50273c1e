"""moekit's own errors in a notebook: one sentence in place of a traceback.

A ValueError or a RankError that moekit raises says in its sentence what was found and what to do; where in moekit it was
raised does not help a user. An error that comes from elsewhere, such as from a cell or from deep inside a library,
keeps its traceback. ``%tb`` shows the whole traceback of either.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from moekit.ranks import RankError

OWN = (ValueError, OSError, RankError)


def show_one_line() -> None:
    """Show moekit's own errors in one line from now on; nothing where there is no IPython."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc(OWN, _show)


def raised_here(error: BaseException | None, traceback: TracebackType | None) -> bool:
    """Whether code of moekit raised the error: a RankError, or one whose innermost frame lies in moekit."""
    if isinstance(error, RankError):
        return True
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and _package(traceback) == "moekit"


def _package(traceback: TracebackType) -> str:
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _show(
    shell: Any, kind: type, error: BaseException, traceback: TracebackType, tb_offset: int | None = None
) -> None:
    """What IPython calls in place of its own display of an error of the kinds ``OWN``."""
    own = raised_here(error, traceback) and not hasattr(error, "_render_traceback_")
    if own:
        error._render_traceback_ = lambda: [f"{kind.__name__}: {error}"]
    shell.showtraceback((kind, error, traceback), tb_offset=tb_offset)
    if own:
        del error._render_traceback_
