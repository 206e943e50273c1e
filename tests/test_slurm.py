"""The scripts for Slurm, run by Slurm on two nodes of one host: the loss is that of one rank, and nothing stays behind."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm import Slurm, missing

import moekit

ROOT = Path(moekit.__file__).parents[1]
SCRIPTS = ROOT / "docker" / "cluster"
DATA = f"{ROOT}/moekit/demo/data/data-bin"
MODEL = f"{ROOT}/moekit/demo/model/model.pt"
# A word's line of eval_lm: the word, how often, its log-probability, whether it was joined.
WORD = re.compile(r"eval_lm \| \S+\t(\d+)\t(-[\d.e-]+)\t(?:True|False)\t")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture(scope="module")
def slurm():
    machines = Slurm(2)
    try:
        yield machines
    finally:
        machines.close()


@pytest.fixture(scope="module")
def environment(slurm):
    minimal = str(Path(__file__).parent / "minimal_ray")
    return {
        "PYTHONPATH": f"{minimal}:{ROOT}",
        "MOEKIT_VENV": str(Path(sys.executable).parents[1]),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(slurm.temp),
    }


def loss_of(said: str) -> float:
    """Base 2, of all digits: eval_lm's last line has four."""
    words = [(int(count), float(logprob)) for count, logprob in WORD.findall(said)]
    return -sum(logprob for _, logprob in words) / sum(count for count, _ in words) / math.log(2)


def left(slurm) -> list[str]:
    """Processes on the machines other than Slurm's own."""
    found = [process.name() for number in range(slurm.count) for process in slurm.processes(number)]
    return [name for name in found if not name.startswith(("slurm", "munge"))]


def test_eval_lm_on_two_nodes_has_the_loss_of_one_rank(slurm, environment):
    arguments = f"{DATA} --path {MODEL} --gen-subset valid --is-moe --cpu --sample-break-mode none --tokens-per-sample 256"
    arguments = [*arguments.split(), "--batch-size", "2", "--no-progress-bar", "--output-word-stats"]
    # Each rank stops behind batch number max_valid_steps: 12 batches are three for each of four ranks.
    alone = subprocess.run(
        [sys.executable, "-m", "moekit.eval_lm", *arguments, "--max-valid-steps", "11"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert alone.returncode == 0, alone.stderr
    options = ["--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    script = SCRIPTS / "eval_lm.sbatch"
    well, said = slurm.run(script, *arguments, "--max-valid-steps", "2", options=options, **environment)
    assert well, said
    assert loss_of(said) == pytest.approx(loss_of(alone.stdout), rel=0, abs=1e-10)
    assert said.count("Loss (base 2)") == 1, "rank 0 alone tells"
    # Ranks that are dealt to the nodes in turn: each process says why it ends, in one line.
    well, said = slurm.run(script, *arguments, options=[*options, "--distribution=cyclic"], **environment)
    assert not well and "ranks of one machine are not next to each other (['n0', 'n1', 'n0', 'n1'])" in said
    assert "rank 1 ends with rank 0" in said and "frame #" not in said
    assert left(slurm) == []


def test_a_notebook_on_two_nodes_of_ray_has_the_loss_of_one_rank(slurm, environment, tmp_path):
    parameters = f"-p world_size 4 -p output_dir {tmp_path}/results -p max_batches 4 -p max_new_tokens 4"
    well, said = slurm.run(
        SCRIPTS / "slurm.sbatch",
        options=["--cpus-per-task=2", "--gpus-per-node=0", f"--chdir={ROOT}"],
        MOEKIT_OUT=str(tmp_path),
        MOEKIT_PARAMETERS=parameters,
        **environment,
    )
    assert well, said[-3000:]
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    with moekit.load("demo", 1, device="cpu", progress=False) as model:
        asked = found["parameters"]
        how = asked["subset"], asked["tokens_per_sample"], asked["batch_size"]
        wanted = model.evaluate("demo", *how, max_batches=4, progress=False)
    assert found["loss_base2"] == pytest.approx(wanted.loss_base2, rel=0, abs=1e-10)
    (notebook,) = tmp_path.glob("*.ipynb")
    assert len(set(re.findall(r"n\d \(10\.77\.0\.\d\)", notebook.read_text()))) == 2
    assert left(slurm) == []
    without_ray = tmp_path / "without_ray"
    (without_ray / "bin").mkdir(parents=True)
    (without_ray / "bin" / "papermill").touch(0o755)
    well, said = slurm.run(
        SCRIPTS / "slurm.sbatch",
        options=["--cpus-per-task=2", "--gpus-per-node=0", f"--chdir={ROOT}"],
        **environment | {"MOEKIT_VENV": str(without_ray), "MOEKIT_OUT": str(tmp_path)},
    )
    assert not well and "slurm.sbatch: a Ray node has ended" in said
