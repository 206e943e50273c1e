"""The versions that a result depends on.

A checkout is asked before the installed package: an editable installation's version is that of the day it was made.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import tomllib
from pathlib import Path

PACKAGES = ("torch", "ve-fairseq", "numpy", "papermill", "jupyterlab", "ipywidgets")
# Those of the extras and of GPUs are told where they are installed.
OPTIONAL = ("triton", "transformers", "ray", "lm-eval")
ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"


def versions() -> dict[str, str | None]:
    """Python's, moekit's, those of the ``PACKAGES``, None where one is not installed, of the ``OPTIONAL`` ones that are, and
    ``cuts`` (:func:`cuts`)."""
    found = {"python": platform.python_version(), "moekit": own(), "cuts": cuts()}
    found |= {name: _installed(name) for name in PACKAGES}
    return found | {name: told for name in OPTIONAL if (told := _installed(name))}


@functools.cache
def own() -> str:
    """moekit's version: in a checkout that of ``pyproject.toml`` with the commit, such as 0.1.0+g1a2b3c4; else the
    installed package's."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        if project["name"] == "moekit":
            return project["version"] + _commit()
    except (OSError, KeyError, TypeError, ValueError):
        pass
    return _installed("moekit") or UNKNOWN


def _commit() -> str:
    """``+g`` and the checkout's commit, ``.dirty`` where files differ from it; empty where git cannot tell."""
    try:
        told = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=.dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"+g{told.stdout.strip()}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------- the cuts of the kernels

# The environment's name of a file with cuts (moekit/nn/kernels/cuts.py), and the most bytes that such a file has.
CUTS, MOST = "MOEKIT_CUTS", 2**20


def cuts() -> str:
    """The table of cuts of this process: "built-in", or the name and the SHA-256 of the file that ``MOEKIT_CUTS`` names."""
    try:
        text = own_cuts()
    except ValueError:
        return UNKNOWN
    if text is None:
        return "built-in"
    return f"{Path(os.environ[CUTS]).name}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.cache
def own_cuts() -> str | None:
    """The text of the file that ``MOEKIT_CUTS`` names, as it was when this process first asked; None without one.

    Raises:
        ValueError: it cannot be read.
    """
    path = os.environ.get(CUTS)
    if not path:
        return None
    try:
        whole = Path(path).expanduser()
        if whole.exists() and not whole.is_file():
            # To open a pipe would wait for its other end.
            raise OSError("no regular file")
        with open(whole, "rb") as file:
            text = file.read(MOST + 1)
        if len(text) > MOST:
            raise ValueError(f"{CUTS}={path}: has more than {MOST:,} bytes, so it is no table of cuts")
        return text.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{CUTS}={path}: is no text, so it is no table of cuts") from None
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{CUTS}={path} cannot be read ({why}); name another file or unset {CUTS}") from None
