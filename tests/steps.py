"""Steps of decoding by a fast way, against those of the slow model."""

from collections.abc import Callable

import torch
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer

# The types of the dictionary that have logits.
VOCAB = 150


def against_slow(
    model: Transformer,
    sequences: int,
    read_on: Callable[[Tensor, Pass], Tensor],
    tolerance: float,
    backend: str,
    steps: int,
) -> None:
    """Compare logits, and what the cache keeps, of sequences of different lengths.

    Args:
        read_on: gives the logits [B, VOCAB] of a pass over tokens [B], which need not be contiguous.
        tolerance: of the distance, as a share of what the slow model gives.
        backend: what ``read_on`` finds in the model. The plain one reads the first tokens.
    """
    generator, device = torch.Generator().manual_seed(7), model.embed.weight.device
    tokens = torch.randint(4, 190, (max(4, sequences), 9), generator=generator)[:sequences].to(device)
    lengths = torch.tensor([5, 2, 3, 1]).repeat(sequences)[:sequences].to(device)
    found = {}
    for fast in (False, True):
        cache = Cache(model.config, sequences, 16, device, model.embed.weight.dtype)
        asked = Pass(cache=cache, groups=sequences)
        with torch.inference_mode():
            model.use("loop")(tokens[:, :5], Pass(cache=cache))
            cache.advance(lengths)
            model.use(backend if fast else "loop")
            logits = []
            for step in range(5, 5 + steps):
                read = tokens[:, step]
                if fast:
                    logits.append(read_on(read, asked))
                else:
                    logits.append(model.logits(model(read[:, None], asked)[:, 0], VOCAB))
                cache.advance(1)
        kept = [cache.kv[:, :, b, :, :length] for b, length in enumerate(cache.lengths.tolist())]
        found[fast] = torch.stack(logits), *kept
    for slow, fast in zip(found[False], found[True], strict=True):
        assert (slow.float() - fast.float()).norm() < tolerance * slow.float().norm()
