"""Triton kernels for GPUs; README.md describes the design, and operations.py has the table of the operations.

Every pass uses kernels for the experts (grouped.py, specialised.py, ordered.py, tiles.py, cuts.py, one_byte.py), the gate's choice
(gate.py), the places of choices (counting.py), activations (activations.py), sums and norms (norm.py) and log-probabilities
(logprobs.py), and on Hopper for attention over whole sequences (flash.py), log-probabilities of many rows (output.py) and dense
layers (dense.py). Decoding also uses kernels for attention of one token (attention.py), the embedding (embedding.py) and all linear
layers: of a few sequences (vectors.py, short_step.py) and of up to 64 (narrow.py, batch_step.py, streamed.py); one sequence of a rank takes one
kernel a step on a Hopper GPU (one_launch.py). trust.py compares these steps with the ordinary kernels before they are used. Loading
uses one that quantises (rounding.py). gpu.py says what a GPU is. The tests compare each kernel with its slow, obvious counterpart in
moekit/nn/operations.py.
"""
