"""What Triton computes on GPUs; README.md tells the design, and operations.py is the table of it.

Of every pass: the experts (grouped.py, tiles.py), the gate's choice (gate.py), sums and norms (norm.py), log-probabilities
(logprobs.py). Of decoding: attention (attention.py), and for a few sequences all linear layers (vectors.py,
short_step.py). Each is tested against its slow, obvious counterpart in moekit/nn/operations.py.
"""
