"""What runs on a rank: load the model there, score batches with it, decode. Nothing here knows notebooks or fairseq.

Each function takes the :class:`moekit.ranks.Rank` it runs on first and is called through ``Ranks.call``.
"""
