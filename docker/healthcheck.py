"""Exits with 0 when JupyterLab answers. /api needs no token."""

import http.client

connection = http.client.HTTPConnection("127.0.0.1", 8888, timeout=2)
connection.request("GET", "/api")
raise SystemExit(connection.getresponse().status != 200)
