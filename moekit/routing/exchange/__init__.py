"""Traces in the layouts of other tools.

    write(trace, "trace.npz", "vllm")
    trace = read("trace.npz", "vllm", num_experts=512)

None of these layouts holds weights or drops, so what is read back has NaN for probabilities, weights and entropy, and
all choices count as kept. What a layout does not hold of the tokens is unknown too (token and predicted -1, target
``PAD``).

| layout | file | holds |
| --- | --- | --- |
| ``vllm`` | whole numbers [T, L, k], L all hidden layers; vLLM hands out such an array for each request (``routed_experts``): a folder with a ``.npy`` for each, one ``.npz`` with all, or one ``.npy`` of one request or of several, as an array of objects (no object is built) or as [requests, T, L, k] padded with -1 | experts |
| ``sglang`` | ``.pt``, ``records`` of a forward pass each: ``topk_ids_of_layer`` int32 [model layers, T, k], ``input_ids``, ``positions``, ``extend_seq_lens``, ``forward_mode``; the recorder's mode "per_token" | experts, tokens, positions |
| ``megatron`` | folder with ``router_trace_rank{N}.jsonl``, a line for each step, microbatch and layer | experts |
| ``olmoe`` | ``.jsonl``, a line for each sample: ``input_ids``, ``predicted_token_ids``, ``exp_ids`` [T][k][L] | experts, tokens, predictions |
| ``moe-infinity`` | ``.npy``, int64 [samples, L, E] | counts: written, not read |

T tokens, L layers, k choices, E experts. A sample is written as one request, forward pass or step. What is read:

- vLLM has a slice for every hidden layer of the model, all zeros for a dense one. A token never has one expert twice, so
  with k > 1 such a slice is no choice and is left out; the other slices' places are the model layers' numbers. A token
  with zeros in all layers was not recorded.
- SGLang splits a prefill pass by ``extend_seq_lens``; a cached prefix lets positions begin anywhere. In a decode pass every
  token belongs to another request, and nothing tells which of an earlier pass: each is a sample of its own. So is each of
  a pass that verifies drafts, which does not tell its requests either.
- SGLang records physical experts; ``last_physical_to_logical_map`` turns them into the model's.
- Megatron repeats a layer within a step for each microbatch: each microbatch is a sample. With a routing map, a token's
  choices come in the order of the experts' numbers, not best first.
- -1 stands for no expert. A token that has none in any layer is padding, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moekit import results
from moekit.arguments import Choice, Whole, Wholes, check, check_regular, reading
from moekit.arguments import Path as PathKind
from moekit.checked import checked
from moekit.headlines import headline
from moekit.mapped import whole_files
from moekit.routing.exchange.readers import FOLDERS, MOST_EXPERTS, READERS, as_trace, files_of
from moekit.routing.exchange.writers import WRITERS
from moekit.routing.trace import TRACE, Trace, need_layers, need_tokens

LAYOUTS = tuple(WRITERS)

__all__ = ["LAYOUTS", "READERS", "WRITERS", "read", "write"]


@checked(trace=TRACE, path=PathKind())
def write(trace: Trace, path: str | Path, layout: str) -> None:
    """Write ``trace`` in one of the ``LAYOUTS``; see the table above for what of it each holds.

    Raises:
        ValueError: there is no such layout, the trace has no tokens or no layers, or the folder holds files of another trace.
        moekit.results.NotWritten: (a ValueError) the folder is missing or cannot be written to, or its disk is full.
    """
    writer = WRITERS[check("layout", layout, Choice(LAYOUTS))]
    need_tokens(trace, f"layout={layout!r}")
    need_layers(trace, f"layout={layout!r}")
    with results.whole(path) as part:
        writer(trace, part)
        if part.is_dir() and path.is_dir():
            written = {file.name for file in part.iterdir()}
            if more := [file.name for file in files_of(path, layout) if file.name not in written]:
                raise ValueError(
                    f"{path} holds {more[0]} of another trace, which would be read with this one: name another folder"
                )


@whole_files()
@checked(path=PathKind(), num_experts=Whole(most=MOST_EXPERTS), layers=Wholes(ordered=True))
def read(
    path: str | Path, layout: str, *, num_experts: int | None = None, layers: Sequence[int] | None = None
) -> Trace:
    """Read a trace that another tool wrote.

    Args:
        num_experts: E. None: what the file tells, or one more than its largest expert.
        layers: the model layers of the file's axis L, where it does not tell ("vllm", "olmoe"). None: 0, 1, ...

    Raises:
        ValueError: the file is not what ``layout`` says, or the arguments do not fit it.
    """
    reader = READERS[check("layout", layout, Choice(tuple(READERS)))]
    layers = None if layers is None else tuple(layers)
    with reading(path):
        if not (path.is_dir() and layout in FOLDERS):
            check_regular(path, f"what {layout} writes")
    try:
        with reading(path):
            samples = list(reader(path, layers))
    except (KeyError, TypeError, AttributeError, IndexError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not what {layout} writes ({headline(error, 100)}); expected the file as the tool "
            "wrote it"
        ) from None
    return as_trace(samples, num_experts, layers, {"path": str(path), "layout": layout})
