"""Functions that run on a rank: loading the model, scoring batches, and decoding. They use neither notebooks nor fairseq.

The first argument of each function is the :class:`moekit.ranks.Rank` it runs on; ``Ranks.call`` calls it.
"""
