"""Known security holes of the packages in a lock file: python audit.py requirements.lock

It asks PyPI, then OSV. The exit code is 0 when every package was looked up and none has a known hole.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SERVICES = ("pypi", "osv")
SECONDS = 600


def ask(service: str, lock: str) -> list[dict]:
    """An entry for each package that ``service`` knows; none where it cannot be reached."""
    options = ["--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", *options, "--vulnerability-service", service, "-r", lock]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        entries = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return []
    return [entry for entry in entries if "skip_reason" not in entry]


def report(lock: str, packages: int, known: list[dict]) -> Iterable[str]:
    """What to print: a line for each hole, then a summary."""
    for entry in known:
        for hole in entry["vulns"]:
            mended = ", ".join(hole["fix_versions"]) or "no version"
            yield f"{entry['name']} {entry['version']}: {hole['id']}, mended in {mended}"
    if not known:
        yield f"{lock}: nothing was checked, as no advisory data can be reached; try it on a machine that reaches the package index"
    else:
        bad = sum(bool(entry["vulns"]) for entry in known)
        yield f"{lock}: {len(known)} of {packages} packages looked up, {bad} with known holes"


def main(lock: str) -> int:
    packages = sum("==" in line for line in Path(lock).read_text().splitlines())
    known = next(filter(None, (ask(service, lock) for service in SERVICES)), [])
    for line in report(lock, packages, known):
        print(line)
    return int(len(known) < packages or any(entry["vulns"] for entry in known))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
