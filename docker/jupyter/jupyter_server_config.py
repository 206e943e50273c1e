"""JupyterLab inside the image; the published port decides who outside can reach it."""

import os

c = get_config()  # noqa: F821 (Jupyter defines it)

c.ServerApp.ip = "0.0.0.0"  # inside the container; run.sh publishes the port on the host's 127.0.0.1 only
c.ServerApp.port = 8888
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.root_dir = "/work"
c.ServerApp.allow_root = os.environ["NB_UID"] == "0"  # a rootless engine: root in here is the caller outside
c.LabApp.default_url = "/lab/tree/notebooks/README.ipynb"
# `docker stop` ends within 5 s: an idle kernel ends by itself (and flushes its files), a busy one is ended
c.KernelManager.shutdown_wait_time = 3.0
