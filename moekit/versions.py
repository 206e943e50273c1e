"""The versions that a result depends on.

A checkout is asked before the installed package: an editable installation's version is that of the day it was made.
"""

from __future__ import annotations

import functools
import importlib.metadata
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
    """Python's, moekit's, those of the ``PACKAGES``, None where one is not installed, and of the ``OPTIONAL`` ones that are."""
    found = {"python": platform.python_version(), "moekit": own()}
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
