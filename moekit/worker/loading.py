"""Load this rank's part of the checkpoint into a model."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path

import torch

from moekit import checkpoint
from moekit.headlines import headline
from moekit.interrupts import hold_interrupts
from moekit.nn import noise, resident, transformer
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import AllToAll, Dispatch, Hierarchical, owned
from moekit.nn.gates import GATES, gate_of, top_k_of
from moekit.nn.kernels.cuts import cuts_of, kind_of
from moekit.nn.peer_memory import reachable
from moekit.nn.resident import Counts, Residence
from moekit.nn.transformer import Transformer
from moekit.ranks import Rank
from moekit.versions import cuts


def load(
    rank: Rank,
    plan: checkpoint.Plan,
    dtype: torch.dtype,
    backend: str,
    verify: bool = True,
    kind: torch.dtype | None = None,
    residence: Residence | None = None,
) -> dict:
    """Read this rank's part of the checkpoint into ``rank.state["model"]``, and report the bytes during reading.

    Args:
        kind: of the experts' matrices, int8 or float8_e4m3fn; None: ``dtype``.
        verify: whether to compare checksums and count non-finite values; each rank checks a share of the shared file.
        residence: how many experts are on the device, and which; None: all.

    Returns:
        ``rank``; ``node``, the machine's name; ``device``, such as "cuda:0"; ``backend`` that computes there; the names of the
        ``files`` and the ``experts`` (a range) that were read; ``filled``, the number of copied tensors by (layer, expert),
        where None is the key of tensors outside the experts; ``nonfinite``, the non-finite values; ``parameters`` of this
        rank, fetched ones too; the ``bytes`` of all weights on the device, and in ``host_bytes`` of the experts that are
        fetched; ``resident``, experts a layer in slots, None for all; ``cuts`` of the kernels, None without any; ``seconds``
        of the load on this rank.
    """
    start = time.perf_counter()
    held = owned(plan.config.experts, rank.world_size, rank.rank)
    model = empty(rank, plan.config, dtype, backend, kind, residence is not None)
    share = (rank.rank, rank.world_size)
    filled = checkpoint.fill(model, plan, held, rank.report, rank.cores, verify, share)
    for layer, numbers in plan.physical.items():
        model.layers[layer].moe.numbers = torch.tensor(numbers, device=rank.device)
    if residence is not None:
        resident.install(model, residence, held, rank.device)
    rank.state["model"] = model
    parameters = list(model.parameters())
    homes = (
        0
        if model.slots is None
        else sum(stack.nbytes for layer in model.slots.layers for stack in layer.home.stacks().values())
    )
    size = sum(tensor.nbytes for tensor in itertools.chain(parameters, model.buffers()))
    return {
        "rank": rank.rank,
        "node": rank.node,
        "device": str(rank.device),
        "backend": model.backend,
        "files": [s.path.name for s in plan.needed(held)],
        "experts": held,
        "filled": Counter(place.where for place in filled),
        "nonfinite": filled.nonfinite,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": size - homes + (0 if model.slots is None else model.slots.nbytes),
        "host_bytes": homes,
        "resident": None if residence is None else residence.count,
        "cuts": cuts() if _has_cuts(plan.config, backend) else None,
        "seconds": time.perf_counter() - start,
    }


def empty(
    rank: Rank,
    config: ModelConfig,
    dtype: torch.dtype,
    backend: str,
    kind: torch.dtype | None = None,
    at_home: bool = False,
) -> Transformer:
    """This rank's part of a model on its device, with weights that are not set yet; a collective.

    Args:
        kind: of the experts' matrices; None: ``dtype``.
        at_home: the experts' weights are in host memory, for :mod:`moekit.nn.resident`.
    """
    if _has_cuts(config, backend):
        # A damaged table is an error before anything is read.
        cuts_of(rank.device, kind_of(dtype, kind or dtype))
    held = owned(config.experts, rank.world_size, rank.rank)
    dispatch = _dispatch(rank, config, dtype, backend, at_home)
    # The first tensor without memory imports a part of torch, and an interrupt must not break this import.
    with hold_interrupts():
        model = transformer.empty(config, rank.device, dtype, len(held), dispatch, kind, at_home)
        return model.use(backend)


def _has_cuts(config: ModelConfig, backend: str) -> bool:
    return backend == "triton" and bool(config.moe_layers)


def _dispatch(
    rank: Rank, config: ModelConfig, dtype: torch.dtype, backend: str, fetched: bool
) -> Dispatch | None:
    """The dispatch to the experts of other ranks: through their memory if every rank can address it.

    Where experts are ``fetched``, their ranks have to know on the host which are needed.
    """
    if rank.world_size == 1 or not config.moe_layers:
        return None
    one_host = rank.local_world_size == rank.world_size
    if backend == "triton" and not fetched and one_host and reachable(rank.device, rank.world_size):
        # Triton is imported only if this backend is selected.
        from moekit.nn.kernels.peer_dispatch import PeerDispatch

        return PeerDispatch(config.experts, top_k_of(config), config.dim, dtype, rank.device)
    return AllToAll(config.experts) if one_host else Hierarchical(config.experts, rank.machines)


def try_gate(rank: Rank, config: ModelConfig, dtype: torch.dtype) -> str | None:
    """What is wrong on this rank with the gate of a model of this ``dtype``, as a sentence; None: it works on a few tokens.

    An error here would cost the rank.
    """
    if config.gate not in GATES:
        return (
            f"the gate {config.gate!r} is not on rank {rank.rank}, which has {', '.join(GATES)}, as ranks in processes of their own "
            "know the gates of moekit/nn/gates.py alone: enter it there, or load the model with world_size=1"
        )
    try:
        with noise.unchanged(rank.device):
            gate_of(config).try_out(rank.device, dtype)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return (
            f"the gate {config.gate!r} fails on a few tokens in {dtype} on rank {rank.rank} ({headline(error, 200)}); expected a "
            "gate as moekit/nn/gate.py describes it: mend it, and load the model again"
        )
    return None


def missing(rank: Rank, sizes: dict[Path, int]) -> tuple[str, list[str]]:
    """The name of the rank's node, and what is wrong there with files of which the driver knows the bytes."""
    wrong = []
    for path, size in sizes.items():
        try:
            if (here := path.stat().st_size) != size:
                wrong.append(f"{path} has {here:,} bytes there and {size:,} on the driver's machine")
        except OSError as error:
            wrong.append(f"{path} cannot be read there ({error.strerror})")
    return rank.node, wrong


def residency(rank: Rank, clear: bool = False) -> list[Counts]:
    """What happened in each MoE layer since it was last cleared; ``clear`` begins again (:func:`resident.begin`)."""
    model: Transformer = rank.state["model"]
    found = [layer.counts for layer in model.slots.layers]
    if clear:
        resident.begin(model)
    return found
