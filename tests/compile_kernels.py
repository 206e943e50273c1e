"""Compile every kernel for a Hopper GPU, which needs none: ``python compile_kernels.py`` prints a line a kernel.

A process of its own, since Triton's interpreter replaces its compiler for a whole process.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moekit.nn.kernels import (
    attention,
    gate,
    grouped,
    logprobs,
    norm,
    peers,
    short_peers,
    tiles,
    vectors,
)

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a program may have there


def compile_for_hopper(
    kernel, types: dict[str, str], constants: dict, warps: int = 4, stages: int = 3
) -> None:
    types = types | dict.fromkeys(constants, "constexpr")
    where = {name: (kernel.arg_names.index(name),) for name in types}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs={where[name]: value for name, value in constants.items()},
        attrs={
            where[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")
        },
    )
    built = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    assert built.metadata.shared <= SHARED, f"{kernel} takes {built.metadata.shared} bytes of shared memory"
    units = (
        "wgmma" if "wgmma.mma_async" in built.asm["ptx"] else "mma" if "mma.sync" in built.asm["ptx"] else "-"
    )
    print(kernel.__name__, constants, built.metadata.shared, units, flush=True)


def compile_grouped(kind: str, cut: grouped.Cut, over_peers: bool = False) -> None:
    for first, blocks in ((True, cut.up), (False, cut.down)):
        n, k = (3072, 768) if first else (768, 3072)
        types = dict.fromkeys(("x", "w", "b", "out", "weights"), f"*{kind}") | {
            "order": "*i32" if over_peers else "*i64",
            "table": "*i32",
            "reach": "*i64",
        }
        types |= dict.fromkeys(("tiles", "experts", "slots"), "i32")
        constants = {
            "CHOICES": 2,
            "N": n,
            "K": k,
            "FIRST": first,
            "WEIGHTED": not first,
            "EXACT": kind == "fp32",
            "SORTED": over_peers,
            "HOME": over_peers and not first,
        }
        constants |= {"ACTIVATION": 2 if first else 0}
        constants |= {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "INNER": blocks.inner}
        constants |= {"weights": None} if first else {}
        constants |= {} if constants["HOME"] else {"reach": None}
        compile_for_hopper(grouped._grouped_linear, types, constants, blocks.warps, blocks.stages)


if __name__ == "__main__":
    for cut in grouped.CUTS:
        compile_grouped("fp16", cut)
    compile_grouped("fp16", grouped.CUTS[-1], over_peers=True)
    compile_grouped("bf16", grouped.CUTS[-1])
    compile_grouped("fp32", grouped.PLAIN)
    for probs in ("fp32", "fp16"):
        types = {"logits": "*fp16", "chosen": "*i64", "eps": "fp32"}
        types |= dict.fromkeys(("probs", "gate_probs", "weights"), f"*{probs}")
        compile_for_hopper(gate._choose, types, {"E": 512, "K": 2, "BLOCK": 512, "OVERLAP": True}, 1)
    types = {"logits": "*bf16", "targets": "*i64", "found": "*fp32"}
    compile_for_hopper(
        logprobs._target_log_probs, types, {"VOCAB": 50_264, "STRIDE": 50_264, "LANES": 512, "WIDTH": 8}, 8
    )
    types = {
        "chosen": "*i64",
        "kept": "*i1",
        "order": "*i64",
        "counts": "*i64",
        "choices": "i32",
        "experts": "i32",
    }
    compile_for_hopper(tiles._by_expert, types, {"CHOICES": 128}, 1)
    types = {"counts": "*i64", "table": "*i32", "experts": "i32", "width": "i32"}
    compile_for_hopper(tiles._tiles, types, {"ROWS": 16, "EXPERTS": 512})
    types = dict.fromkeys(("qkv", "kv", "out"), "*fp16") | {
        "lengths": "*i64",
        "slots": "i32",
        "scale": "fp32",
    }
    for slots, warps in (attention.ALONE, attention.IN_COMPANY):
        constants = {"H": 12, "C": 64, "BLOCK": 64, "SLOTS": slots, "OVERLAP": True}
        compile_for_hopper(attention._attend_one, types, constants, warps)
    types = dict.fromkeys(("x", "pending", "weight", "bias", "total", "normed"), "*fp16")
    types |= {"rows": "i32", "eps": "fp32"}
    compile_for_hopper(norm._add_norm, types, {"PARTS": 2, "D": 768, "ROWS": norm.ROWS, "BLOCK": 1024})
    types = {"logits": "*fp16", "parts": "*fp32", "rows": "i32"}
    constants = {"VOCAB": 50_264, "STRIDE": 50_264, "PAD": 1, "PART": 1571, "BLOCK": 2048, "PARTS": 32}
    compile_for_hopper(logprobs._best_of_part, types, constants)
    types = {"parts": "*fp32", "found": "*i64", "logprobs": "*fp32", "rows": "i32"}
    compile_for_hopper(logprobs._best_of_row, types, {"PARTS": 32}, 1)
    for rows, k, n, columns in ((1, 768, 2304, 4), (4, 768, 512, 1), (1, 3072, 768, 4)):
        types = dict.fromkeys(("x", "w", "b", "gain", "shift", "normed", "onto", "out"), "*fp16")
        types |= {"rows": "i32", "eps": "fp32"}
        constants = {"N": n, "K": k, "ACTIVATION": 2, "EXACT": False, "ROWS": rows, "COLUMNS": columns}
        constants |= {"INNER": 1024, "OVERLAP": True}
        constants |= {"onto": None} if k == 768 else {"gain": None, "shift": None}
        compile_for_hopper(vectors._linear, types, constants, vectors.WARPS)
    types = dict.fromkeys(("x", "w", "b", "out"), "*fp16") | {"chosen": "*i64"}
    constants = {"CHOICES": 2, "N": 3072, "K": 768, "ACTIVATION": 2, "EXACT": False}
    constants |= {"COLUMNS": 4, "INNER": 1024, "OVERLAP": True}
    compile_for_hopper(vectors._experts_up, types, constants, vectors.WARPS)
    types |= {"weights": "*fp32", "onto": "*fp16"}
    constants = {"CHOICES": 2, "N": 768, "K": 3072, "COLUMNS": 2, "INNER": 1024, "OVERLAP": True}
    compile_for_hopper(vectors._experts_down, types, constants, vectors.WARPS)
    waits = {
        "flags": "*i32",
        "reach": "*i64",
        "times": "*i32",
        "gave_up": "*i32",
        "rank": "i32",
        "limit": "i64",
    }
    ways = {"W": 8, "RANKS": 8, "TIMED": True}
    compile_for_hopper(peers._meet, waits, ways, 1)
    types = {"x": "*fp16", "order": "*i64", "counts": "*i64", "weights": "*fp16", "rows": "i32"}
    types |= {
        "x_out": "*fp16",
        "order_out": "*i32",
        "starts_out": "*i32",
        "weights_out": "*fp32",
        "home": "*fp16",
    }
    constants = {"E": 512, "K": 2, "D": 768, "BLOCK": 1024, "EXPERTS": 512}
    compile_for_hopper(peers._publish, types, constants)
    types = {
        "order": "*i32",
        "starts": "*i32",
        "reach": "*i64",
        "out": "*i32",
        "counts": "*i64",
        "total": "*i32",
    }
    types |= dict.fromkeys(("first", "held", "slots"), "i32")
    compile_for_hopper(peers._merge, types, {"W": 8, "EXPERTS": 64, "SEGMENT": peers.SEGMENT})
    types = {"x": "*fp16", "weights": "*fp32", "reach": "*i64", "order": "*i32", "total": "*i32"}
    types |= {"rows_out": "*fp16", "weights_out": "*fp32", "slots": "i32"}
    compile_for_hopper(peers._pull, types, {"K": 2, "D": 768, "ROWS": peers.PULLED, "BLOCK": 1024})
    types = waits | {"logits": "*fp16", "x": "*fp16", "chosen": "*i32", "weights": "*fp32", "x_out": "*fp16"}
    types |= {"rows": "i32", "eps": "fp32"}
    constants = ways | {"E": 512, "K": 2, "D": 768, "MOST": 2, "ROWS": 2, "EXPERTS": 512, "BLOCK": 1024}
    constants |= {"HALF": True, "BRAIN": False, "OVERLAP": True}
    compile_for_hopper(short_peers._hand_out, types, constants, vectors.WARPS)
    types = {"x": "*fp16", "w": "*fp16", "b": "*fp16", "chosen": "*i32", "reach": "*i64", "out": "*fp16"}
    types |= {"first": "i32", "held": "i32"}
    constants = {"K": 2, "SLOTS": 2, "N": 3072, "D": 768, "ACTIVATION": 2, "EXACT": False, "COLUMNS": 4}
    compile_for_hopper(short_peers._up, types, constants | {"INNER": 1024, "OVERLAP": True}, vectors.WARPS)
    types = {"x": "*fp16", "w": "*fp16", "b": "*fp16", "chosen": "*i32", "weights": "*fp32", "reach": "*i64"}
    types |= {"home": "*fp16", "first": "i32", "held": "i32"}
    constants = {"SLOTS": 2, "N": 768, "D": 3072, "COLUMNS": 4, "INNER": 1024, "OVERLAP": True}
    compile_for_hopper(short_peers._down, types, constants, vectors.WARPS)
    types = waits | {"home": "*fp16", "onto": "*fp16", "out": "*fp16", "rows": "i32"}
    constants = ways | {"K": 2, "D": 768, "ROWS": 2, "BLOCK": 1024, "OVERLAP": True}
    compile_for_hopper(short_peers._collect, types, constants, vectors.WARPS)
