"""What Triton computes on GPUs; README.md tells the design.

Of every pass: the experts (grouped.py, tiles.py), the gate's choice (gate.py), sums and norms (norm.py), log-probabilities
(logprobs.py). Of decoding: attention (attention.py), and for a few sequences all linear layers (vectors.py, short_step.py). Each has
a slow, obvious counterpart elsewhere, which it is tested against.
"""
