"""Traces of chosen size for tests: skewed loads, domains that prefer experts, drops by position."""

import numpy as np

from moekit.routing.trace import Trace


def synthetic(tokens=1024, layers=(1, 3), experts=16, choices=2, block=128, domains=4, seed=0, vocab=200):
    """A trace, and its domain labels [T]. Samples of ``block`` tokens, domains in runs of half a block."""
    rng = np.random.default_rng(seed)
    depth = len(layers)
    row = np.arange(tokens)
    domain = (row // max(1, block // 2)) % domains
    token = (rng.zipf(1.3, tokens) * 7 + domain) % (vocab - 4) + 4
    # Logits of the gate: how popular an expert is, what its domain and its token prefer, and noise.
    chosen, probs = (
        np.empty((tokens, depth, choices), np.int16),
        np.empty((tokens, depth, choices), np.float32),
    )
    entropy = np.empty((tokens, depth), np.float32)
    for place in range(depth):
        popular = rng.normal(0, 0.7, experts)
        of_domain = rng.normal(0, 1.3, (domains, experts))
        of_token = rng.normal(0, 1.0, (vocab, experts)).astype(np.float32)
        for start in range(0, tokens, 16_384):
            some = slice(start, start + 16_384)
            logits = popular + of_domain[domain[some]] + of_token[token[some]]
            logits += rng.normal(0, 0.7, logits.shape)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            best = np.argsort(-p, axis=1, kind="stable")[:, :choices]
            chosen[some, place], probs[some, place] = best, np.take_along_axis(p, best, 1)
            entropy[some, place] = -(p * np.log(p + 1e-30)).sum(axis=1)
    position = (row % block).astype(np.int32)
    lost = rng.random(chosen.shape) < 0.3 * (position / block)[:, None, None] * np.arange(1, choices + 1)
    weights = np.where(lost, 0, probs)
    weights = (weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-9)).astype(np.float32)
    last = (position == block - 1) | (row == tokens - 1)
    target = np.where(last, 1, np.roll(token, -1)).astype(np.int32)
    logprob = np.where(last, np.nan, -rng.gamma(2, 1.5, tokens)).astype(np.float32)
    trace = Trace(
        sample=(row // block).astype(np.int32),
        position=position,
        token=token.astype(np.int32),
        target=target,
        generated=np.zeros(tokens, bool),
        logprob=logprob,
        predicted=np.roll(target, 1),
        layers=tuple(layers),
        experts=chosen,
        probs=probs,
        weights=weights,
        kept=~lost,
        entropy=entropy,
        full={},
        num_experts=experts,
        meta={},
    )
    return trace, np.array([f"domain {d}" for d in domain])
