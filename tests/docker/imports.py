"""Imports every module that the packages named as arguments brought; run inside the image."""

import importlib
import importlib.metadata
import re
import sys

modules = {}
for module, packages in importlib.metadata.packages_distributions().items():
    for package in packages:
        modules.setdefault(re.sub(r"[-_.]+", "-", package).lower(), set()).add(module)

for package in sys.argv[1:]:
    found = sorted(m for m in modules[package] if m.isidentifier() and not m.startswith("_"))
    assert found, f"{package} brought no module"
    for module in found:
        importlib.import_module(module)
    print(package, importlib.metadata.version(package), *found)
