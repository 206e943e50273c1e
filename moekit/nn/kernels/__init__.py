"""Triton kernels for GPUs; README.md describes the design, and operations.py has the table of the operations.

Every pass uses kernels for the experts (grouped.py, specialised.py, tiles.py, cuts.py, one_byte.py), the gate's choice
(gate.py), activations (activations.py), sums and norms (norm.py) and log-probabilities (logprobs.py), and on Hopper for
attention over whole sequences (flash.py). Decoding also uses a kernel for attention of one token (attention.py) and, for
a few sequences, kernels for all linear layers (vectors.py, short_step.py). The tests compare each kernel with its slow,
obvious counterpart in moekit/nn/operations.py.
"""
