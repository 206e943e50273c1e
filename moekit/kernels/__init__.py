"""What Triton computes on GPUs: the experts (grouped.py), the gate's choice (gate.py) and log-probabilities (logprobs.py).

README.md tells the design. Each has a slow, obvious counterpart elsewhere, which it is tested against.
"""
