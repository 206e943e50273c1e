"""New processes, the pipes to them, and what the system tells of them. Nothing here imports torch, so that a server can be started
before torch is imported."""
