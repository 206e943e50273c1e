"""Hostile pickles execute nothing, import nothing, and take neither long nor much memory to refuse."""

import json
import subprocess
import sys
from pathlib import Path


def test_hostile_pickles_are_refused_and_execute_nothing(tmp_path, counted):
    """In a process of its own, as an audit hook stays; it ends each trial after 20 s."""
    script = Path(__file__).with_name("hostile_pickles.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    counted("hostile pickles", "refused", found["refused"])
    counted("hostile pickles", "executed", int(found["executed"]))
    print(f"slowest {found['slowest']}, most memory beyond the file's size {found['largest']}")
    assert found["payloads"] >= 100
    assert not found["executed"] and not found["events"]
    assert not found["other"] and found["refused"] == found["tried"]
    # Tensors are read up to the most that a file without storages may have, a kilobyte each.
    assert found["largest"][1] < 96 << 20
    for name, text in found["told"].items():
        assert "model-shared.pt" in text and len(text) < 600 and text.isprintable(), (name, text)
        if name.startswith("os.system") and "(bare)" not in name:
            assert "asks to load" in text and "(at extra_state)" in text, text
