"""The stages of .ci/run and .ci/test: none that fails is taken to have passed, and an end leaves no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from processes import gone
from test_project import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="for the machines that CI runs on"),
]
HEAD = f"#!/usr/bin/env bash\n. {ROOT}/.ci/stages\n"
BOTH = HEAD + "beside one {one}\nstage two {two}\nshown one\nfinish 'How long:'\n"
FAULTS = {
    "an exit": "bash -c 'echo tried; exit 3'",
    "a program that is not there": "no-such-program",
    "a signal": "bash -c 'kill -SEGV $$'",
    "a stage that is killed": "bash -c 'kill -KILL $PPID'",
    "a pipe": "bash -c 'set -o pipefail; false | cat'",
    "a failure that says it has passed": "bash -c 'echo one 0 s passed; false'",
}


@pytest.fixture
def script(tmp_path):
    """A script that runs stages, and what it printed."""
    path = tmp_path / "script"

    def run(text: str, *command) -> subprocess.CompletedProcess:
        path.write_text(text)
        path.chmod(0o755)
        return subprocess.run([*command, path], capture_output=True, text=True, timeout=60, cwd=tmp_path)

    return run


def test_all_pass(script):
    done = script(BOTH.format(one="bash -c 'sleep 0.5; echo first'", two="echo second"))
    assert done.returncode == 0 and done.stderr == ""
    *before, title, one, two, total = done.stdout.splitlines()
    assert title == "How long:" and before.index("second") < before.index("first")
    assert {one.split()[0], two.split()[0], total.split()[0]} == {"one", "two", "total"}
    assert all(line.endswith("s  passed") for line in (one, two, total))


@pytest.mark.parametrize("where", ["one", "two", "both"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_that_fails_fails_the_whole(script, where, fault):
    stages = {"one": "touch one", "two": "touch two"}
    stages |= dict.fromkeys(["one", "two"] if where == "both" else [where], FAULTS[fault])
    done = script(BOTH.format(**stages))
    assert done.returncode == 1
    *_, total = lines = done.stdout.splitlines()
    assert total.startswith("total ") and total.endswith("FAILED")
    table = lines[lines.index("How long:") :]
    for name in ("one", "two"):
        [how] = [line for line in table if line.startswith(f"{name} ")]
        assert ("FAILED" in how) == (where in (name, "both")), how


def test_the_other_stage_runs_on(script, tmp_path):
    for one, two in (("false", "touch two"), ("bash -c 'sleep 1; touch one'", "false")):
        assert script(BOTH.format(one=one, two=two)).returncode == 1
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


# It ends in its own time; it does not end by itself, and has a child in the background; it has stages of its own.
ENDS = "bash -c 'trap \"sleep 0.5; touch ended; exit 1\" TERM; echo begun; echo $$ >>pids; sleep 60 & echo $! >>pids; wait'"
STAYS = "bash -c 'trap \"\" INT TERM; echo $$ >>pids; sleep 60 & echo $! >>pids; wait; sleep 60'"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("which", ["stages", "stages within a stage"])
def test_an_end_leaves_no_process(tmp_path, how, which):
    inner = tmp_path / "inner"
    inner.write_text(HEAD + f"echo begun\nPATIENCE=1\nbeside a {STAYS}\nstage b {ENDS}\nshown a\nfinish ''\n")
    inner.chmod(0o755)
    one, two = (ENDS, STAYS) if which == "stages" else (str(inner), ENDS)
    (tmp_path / "script").write_text(BOTH.format(one=one, two=two).replace(HEAD, HEAD + "PATIENCE=2\n"))
    script = subprocess.Popen(
        ["bash", "script"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wanted, pids = 4 if which == "stages" else 6, []
    for _ in range(200):
        time.sleep(0.05)
        pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
        if len(pids) == wanted:
            break
    pids = {int(pid) for pid in pids} | {
        child.pid for child in psutil.Process(script.pid).children(recursive=True)
    }
    assert len(pids) >= wanted
    os.kill(script.pid, how)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == {signal.SIGINT: 130}.get(how, 143) and "total" not in said
    assert "The end of the output of one:\nbegun\n" in said
    assert gone(pids) and (tmp_path / "ended").exists()


@pytest.mark.parametrize("fails", ["-m not slow", " --ignore=", " tests/test_kernels.py", None])
def test_the_tests_fail_where_any_run_fails(tmp_path, fails):
    """With a Python that notes how it is called in place of the tests."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\ncase "$*" in *"{fails}"*) exit 1 ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "test", python], capture_output=True, text=True, timeout=60)
    assert done.returncode == (fails is not None), done.stdout
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert calls == [
        "-m pytest -m not slow --durations=10",
        "-m pytest -m slow --durations=10 --ignore=tests/test_kernels.py --ignore=tests/test_peers.py",
        "-m pytest -m slow --durations=10 tests/test_kernels.py tests/test_peers.py",
    ]
