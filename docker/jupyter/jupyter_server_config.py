"""JupyterLab inside the image. The address of the published port limits who outside can reach it."""

import os

c = get_config()  # noqa: F821 (Jupyter defines it)

# All addresses of the container; run.sh publishes the port on the host's 127.0.0.1 only.
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.port = 8888
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.root_dir = "/work"
# In a rootless engine, root inside is the caller outside.
c.ServerApp.allow_root = os.environ["NB_UID"] == "0"
c.LabApp.default_url = "/lab/tree/notebooks/README.ipynb"
# Seconds, so that `docker stop` ends within 5: an idle kernel ends by itself and flushes its files, a busy one is killed.
c.KernelManager.shutdown_wait_time = 3.0
