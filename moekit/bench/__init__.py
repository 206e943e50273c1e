"""Speed, measured: ``python -m moekit.bench NAME``. A figure that a machine's load changes is no test."""
