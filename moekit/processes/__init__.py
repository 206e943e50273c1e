"""New processes and the pipes to them. Nothing here imports torch, so that a server can be started before torch is imported."""
