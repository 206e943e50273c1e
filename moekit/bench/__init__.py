"""Benchmarks: ``python -m moekit.bench NAME``. They are not tests, since the load of a machine changes their figures."""
