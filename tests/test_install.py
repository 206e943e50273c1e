"""``pip install .`` into an empty environment brings what the library needs, and nothing of JupyterLab."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_project import PROJECT, ROOT, pins

pytestmark = pytest.mark.slow

USE = """
import importlib.metadata, importlib.util, json, sys
import moekit
from moekit.routing import metrics

model = moekit.load("demo", 1, "cpu", progress=False)
texts = ["Once upon a time", "import numpy as np"]
trace = model.trace(texts, progress=False)
print(json.dumps({
    "file": moekit.__file__,
    "version": importlib.metadata.version("moekit"),
    "there": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
    "score": model.score(texts)["logprob"].tolist(),
    "generated": [made.text for made in model.generate(texts, max_new_tokens=8, temperature=0.0)],
    "load": metrics.load(trace)["value"].tolist(),
}, default=float))
"""
LAB = ["jupyterlab", "IPython", "ipywidgets", "papermill", "anywidget", "matplotlib"]


def run(*command, **options) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, **options
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def used(python: Path | str, folder: Path, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return json.loads(run(python, "-c", USE, *LAB, cwd=folder, env=environment).splitlines()[-1])


def test_the_library_alone(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "elsewhere"
    folder.mkdir()
    # A copy, as building leaves folders in the source.
    parts = ["moekit", "pyproject.toml", "README.md", "LICENSE"]
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *parts, cwd=ROOT)
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    locked = pins((ROOT / "requirements.lock").read_text().splitlines())
    (tmp_path / "versions").write_text("".join(f"{name}=={version}\n" for name, version in locked.items()))
    torch = next(
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TORCH := ")
    )
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    pip += ["--constraint", tmp_path / "versions"]
    run(*pip, torch.removeprefix("TORCH := "))
    run(*pip, source)
    installed = used(python, folder)
    assert Path(installed.pop("file")).is_relative_to(tmp_path / "venv")
    assert installed.pop("version") == PROJECT["project"]["version"]
    assert installed.pop("there") == []
    here = used(sys.executable, folder, PYTHONPATH=str(ROOT))
    assert here["there"] == LAB
    assert installed == {name: here[name] for name in installed}
