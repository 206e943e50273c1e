"""On the path of a test's Ray nodes: they run like Ray's minimal installation, whose agents start in a third of the time.

A node gives up when its agents take more than 15 s, as they may on a busy host.
"""

import sys

HIDDEN = {"aiohttp_cors", "grpc", "opencensus", "opentelemetry", "prometheus_client", "pydantic"}


class Hidden:
    """Finds none of the packages that only Ray's dashboard needs."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden from this node")


# The agent of runtime environments brings its own copy.
if not any("runtime_env" in argument for argument in sys.orig_argv):
    HIDDEN.add("aiohttp")
sys.meta_path.insert(0, Hidden)
