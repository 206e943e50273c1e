"""Results say which moekit made them, from a checkout and from an installed package."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from test_project import ROOT

import moekit
from moekit import versions


def run(code: str, folder, **environment) -> str:
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_a_result_names_every_version():
    found = versions.versions()
    assert {"python", "moekit", "torch", "ve-fairseq", "numpy", "papermill"} <= set(found)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\+g[0-9a-f]{7,}(\.dirty)?)?", found["moekit"])
    assert moekit.__version__ == found["moekit"]


def test_what_is_installed_beside_is_named(monkeypatch):
    there = {"triton": "3.5.0", "lm-eval": "0.4.13", "torch": "2.11.0"}
    monkeypatch.setattr(versions, "_installed", there.get)
    found = versions.versions()
    assert found["triton"] == "3.5.0" and found["lm-eval"] == "0.4.13"
    assert not {"ray", "transformers"} & set(found) and found["numpy"] is None


def test_a_checkout_without_git_and_without_an_installation(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "moekit").mkdir()
    shutil.copy(ROOT / "moekit" / "versions.py", tmp_path / "moekit")
    (tmp_path / "moekit" / "__init__.py").touch()
    assert re.fullmatch(
        r"\d+\.\d+\.\d+", run("from moekit.versions import own; print(own())", tmp_path, PATH="")
    )
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "9"\n')
    assert run("from moekit.versions import own; print(own())", tmp_path, PATH="") == versions.UNKNOWN


@pytest.mark.parametrize("name", ["metrics", "exchange", "compare", "explore"])
def test_what_is_imported_when_it_is_asked_for(name):
    assert name in moekit.__all__ and getattr(moekit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'metric'"):
        moekit.metric  # noqa: B018


def test_the_analysis_is_not_imported_with_the_package():
    code = "import sys, moekit; print([n for n in sys.modules if n.startswith(('matplotlib', 'scipy', 'ipywidgets'))])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_cuts_that_are_a_pipe_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = "from moekit import versions; print(versions.cuts()); versions.own_cuts()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MOEKIT_CUTS": str(tmp_path / "pipe")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "unknown\n" and "cannot be read (no regular file)" in done.stderr
