"""Presses the interrupt key at random moments of a kernel's first calls; run as a program by test_faults.py.

Each trial is a fork of this process, which has imported moekit and done nothing with it, as a kernel has after its first
cell. After the interrupt the same process has to load and evaluate as if nothing had happened.

    python tests/interrupted.py TRIALS SEED FOLDER
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import moekit

EXPECTED = 4.271715  # the demo's loss
OPERATIONS = ("load", "evaluate", "generate", "trace", "text", "score")


def work(operation, model):
    if operation == "evaluate":
        return model.evaluate("demo", progress=False)
    if operation == "trace":
        return model.trace("demo", max_tokens=2000, progress=False)
    if operation == "text":
        return model.trace(["Alice was beginning to get very tired"], progress=False)
    if operation == "score":
        return model.score("Alice was beginning to get very tired")
    if operation == "generate":
        return model.generate("Alice was", max_new_tokens=8)


def trial(operation, world_size):
    """In a fork: the calls that are interrupted, and the same again."""
    model = None
    print("begin", flush=True)
    try:
        model = moekit.load("demo", world_size, "cpu", progress=False)
        for first in (operation, *OPERATIONS[1:]):
            work(first, model)
        while True:  # the key comes yet
            time.sleep(0.01)
    except KeyboardInterrupt:
        where = traceback.format_exc().strip().split("\n")
        print("interrupted in", *where[-3:], flush=True)
    if model is not None and world_size == 1:
        loss = model.evaluate("demo", progress=False).loss_base2  # one rank survives an interrupt
        assert abs(loss - EXPECTED) < 1e-6, loss
    again = moekit.load("demo", world_size, "cpu", progress=False)
    loss = again.evaluate("demo", progress=False).loss_base2
    assert abs(loss - EXPECTED) < 1e-6, loss
    assert len(again.generate("Alice was", max_new_tokens=2)[0].ids) == 2
    assert len(again.trace("demo", max_tokens=500, progress=False).sample) > 0
    again.close()


def main(trials, seed, folder):
    # A shell starts what runs in its background with the key ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(seed)
    bad = 0
    for number in range(trials):
        operation, world_size = chance.choice(OPERATIONS), chance.choice((1, 2))
        wait = chance.uniform(0, 4.0)
        said = Path(folder) / f"trial-{number}.txt"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                log = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                trial(operation, world_size)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        while not said.exists() or not said.read_text():
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(child, signal.SIGINT)
        end = time.monotonic() + 300
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.02)
        if ended == (0, 0):
            os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        if ended[1] != 0:
            bad += 1
            print(f"trial {number}: {operation} on {world_size} after {wait:.2f} s, status {ended[1]}")
            print(said.read_text(), flush=True)
    print(f"{trials} interrupts, {bad} bad", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]) > 0)
