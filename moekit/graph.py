"""One step of decoding as a CUDA graph: some two hundred small kernels, launched with one call.

Shape letters: B sequences, V dictionary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.cache import Cache
from moekit.dispatch import Local
from moekit.model import Pass, Transformer

WARM_UP = 2  # passes before the capture: libraries allocate, and Triton compiles, at their first


def fits(model: Transformer, step: Pass) -> bool:
    """Whether a pass runs on the device alone, so that it can be captured."""
    config = model.config
    draws = config.second_expert != "all" and not config.top1
    local = all(isinstance(layer.moe.dispatch, Local) for layer in model.layers if hasattr(layer, "moe"))
    on_gpu = model.embed.weight.is_cuda and model.kernel == "triton"
    return on_gpu and local and not draws and step.record is None and step.edit is None


class Graph:
    """Each of B sequences reads a token: the graph of it, for as long as the cache's tensors stay where they are."""

    def __init__(self, model: Transformer, cache: Cache, vocab: int):
        self.read = torch.zeros(len(cache.lengths), dtype=torch.long, device=cache.lengths.device)

        from moekit.kernels import few  # Triton is there where there are graphs, not everywhere

        def step() -> Tensor:
            # It writes to the cache where the token comes to lie, and moves nothing: repeating it does no harm.
            if few.fits(model, len(self.read)):
                return few.read_on(model, self.read, cache, vocab)
            features = model(self.read[:, None], Pass(groups=len(self.read), cache=cache))
            return model.logits(features[:, 0], vocab)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # On the stream of the warm-up, whose libraries have their workspaces; other threads may go on allocating.
        with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
            self.logits = step()

    def __call__(self, read: Tensor) -> Tensor:
        """Tokens [B] int64 -> logits [B, V] of what follows, which the next call overwrites."""
        self.read.copy_(read)
        self.graph.replay()
        return self.logits
