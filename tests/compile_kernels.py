"""Compile every kernel for GPUs, which needs none: ``python compile_kernels.py 90`` prints a line a kernel for Hopper.

A process of its own, since Triton's interpreter replaces its compiler for a whole process.
"""

import itertools
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from moekit.nn.kernels import (
    attention,
    batch_peers,
    batch_step,
    counting,
    cuts,
    embedding,
    flash,
    gate,
    grouped,
    logprobs,
    narrow,
    norm,
    one_kernel,
    one_launch,
    ordered,
    output,
    peers,
    rounding,
    short_peers,
    specialised,
    streamed,
    tiles,
    vectors,
)

# The compute capability -> the bytes of shared memory that a program may have there.
SHARED = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED = {capability: kib * 1024 for capability, kib in SHARED.items()}


class Target:
    """A GPU to compile for."""

    def __init__(self, capability: int):
        self.capability, self.shared = capability, SHARED[capability]
        # Programmatic dependent launch.
        self.overlap = {"OVERLAP": capability >= 90}

    def compile(
        self, kernel, types: dict[str, str], constants: dict, warps: int = 4, stages: int = 3, **options
    ) -> None:
        types = types | dict.fromkeys(constants, "constexpr")
        where = {name: (kernel.arg_names.index(name),) for name in types}
        source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
            fn=kernel,
            signature={name: types[name] for name in kernel.arg_names},
            constexprs={where[name]: value for name, value in constants.items()},
            attrs={
                where[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")
            },
        )
        target = GPUTarget("cuda", self.capability, 32)
        options = {"num_warps": warps, "num_stages": stages} | options
        built = triton.compile(source, target=target, options=options)
        assert built.metadata.shared <= self.shared, f"{kernel} takes {built.metadata.shared} bytes"
        ptx = built.asm["ptx"]
        units = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
        print(self.capability, kernel.__name__, constants, built.metadata.shared, *units or "-", flush=True)

    def grouped(
        self, kind: str, cut: cuts.Cut, one_byte: int = 0, over_peers: bool = False, sorted_rows: bool = True
    ) -> None:
        for first, blocks in ((True, cut.up), (False, cut.down)):
            n, k = (3072, 768) if first else (768, 3072)
            types = dict.fromkeys(("x", "w", "b", "out", "weights"), f"*{kind}") | {
                "order": "*i32" if over_peers else "*i64",
                "table": "*i32",
                "reach": "*i64",
            }
            types |= dict.fromkeys(("tiles", "experts", "room"), "i32") | {"scale": "*fp32"}
            types |= {"w": "*i8"} if one_byte else {}
            types |= {"weights": "*fp32"} if over_peers else {}
            constants = {
                "CHOICES": 2,
                "N": n,
                "K": k,
                "FIRST": first,
                "WEIGHTED": not first,
                "EXACT": kind == "fp32",
                "SORTED": over_peers and sorted_rows,
                "HOME": over_peers and not first,
                "SWAPPED": blocks.swapped,
            }
            constants |= {"ACTIVATION": 2 if first else 0} | weights_of(one_byte)
            constants |= {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "INNER": blocks.inner}
            constants |= ({"weights": None} if first else {}) | self.overlap
            constants |= {} if constants["HOME"] else {"reach": None}
            self.compile(grouped._grouped_linear, types, constants, blocks.warps, blocks.stages)

    def specialised(self, kind: str, cut: cuts.Cut) -> None:
        rows, columns = specialised.block_layouts(cut.up, gl.float16 if kind == "fp16" else gl.bfloat16)
        over_peers = {"order": "*i32", "weights": "*fp32"}
        for first, blocks, none, other in (
            (True, cut.up, ("weights", "reach", "order"), {}),
            (False, cut.down, ("reach",), {}),
            (False, cut.down, (), over_peers),
            (True, cut.up, ("weights", "reach", "order", "table"), {}),
        ):
            n, k = (3072, 768) if first else (768, 3072)
            types = dict.fromkeys(("b", "out", "weights"), f"*{kind}") | {"order": "*i64", "table": "*i32"}
            types |= dict.fromkeys(("tiles", "experts", "made", "room"), "i32") | {"reach": "*i64"} | other
            types["rows"] = f"tensordesc<{kind}[64, {blocks.inner}],{rows!r}>"
            block = f"{blocks.columns // 32}, 4, 4, 2, {blocks.inner}"
            types["columns"] = f"tensordesc<{kind}[{block}],{columns!r}>"
            options, registers = specialised.launch(blocks)
            constants = {"N": n, "K": k, "FIRST": first, "WEIGHTED": not first, "TEAM_REGISTERS": registers}
            constants |= {"COLUMNS": blocks.columns, "INNER": blocks.inner, "STAGES": blocks.stages}
            constants |= {"ACTIVATION": 2 if first else 0} | dict.fromkeys(none)
            constants["OUT"] = specialised.layout(blocks.rows, blocks.columns, blocks.warps)
            self.compile(
                specialised._specialised_linear, types, constants, blocks.warps, maxnreg=options["maxnreg"]
            )

    def streamed(self, kind: str) -> None:
        """The gate's choice and the experts of up to 8 and of up to 16 rows."""
        block = streamed.block_layout(gl.float16 if kind == "fp16" else gl.bfloat16)
        matrix = f"tensordesc<{kind}[{streamed.COLUMNS.value}, {streamed.INNER.value}],{block!r}>"
        types = dict.fromkeys(("x", "hidden", "up_b", "down_b", "out", "logits", "weights"), f"*{kind}")
        types |= {"up": matrix, "down": matrix, "order": "*i64", "table": "*i32", "count": "*i64"}
        types |= {"rows": "i32", "eps": "fp32"}
        constants = {"E": 512, "D": 768, "F": 3072, "ACTIVATION": 2, "HALF": False, "BRAIN": False}
        constants |= {"PROGRAMS": 132} | self.overlap
        for most in (8, streamed.MOST):
            self.compile(streamed._streamed_ffn, types, constants | {"MOST": most}, streamed.WARPS)

    def counting(self) -> None:
        """The places of choices in buffers, and the order of choices."""
        types = {"chosen": "*i64", "before": "*i32", "bases": "*i32", "counts": "*i64", "order": "*i64"}
        types |= {"weights": "*fp32", "filled": "*fp16", "kept": "*i1", "eps": "fp32"}
        types |= dict.fromkeys(("tokens", "groups", "chunks", "experts", "capacity"), "i32")
        for top_k, fills, none in ((2, True, ()), (1, False, ("weights", "filled"))):
            sizes = {"K": top_k, "WIDTH": 512}
            each = sizes | {"FILL": fills, "BINS": 512, "CHUNK": counting.CHUNK}
            adding = {"TOGETHER": counting.TOGETHER, "GROUPS": 64, "CHUNKS": 16}
            for kernel, warps, constants in (
                (counting._count, 4, each),
                (counting._add_up, 8, sizes | adding),
                (counting._place, 8, each | {"AGAIN": fills} | dict.fromkeys(none)),
            ):
                needed = {name: kind for name, kind in types.items() if name in kernel.arg_names}
                self.compile(kernel, needed, constants, warps)

    def output(self, kind: str) -> None:
        """The output matrix and the log-probabilities in one."""
        block = output.layout(gl.float16 if kind == "fp16" else gl.bfloat16)
        types = dict.fromkeys(("rows", "row_blocks", "segments", "each"), "i32") | {"parts": "*fp32"}
        types["features"] = f"tensordesc<{kind}[{output.ROWS.value}, {output.INNER.value}],{block!r}>"
        types["weight"] = f"tensordesc<{kind}[{output.TYPES.value // 2}, {output.INNER.value}],{block!r}>"
        self.compile(output._output, types, {"V": 50_264, "D": 768}, 4, maxnreg=output.REGISTERS)
        types = {"features": f"*{kind}", "weight": f"*{kind}", "targets": "*i64", "parts": "*fp32"}
        types |= {"found": "*fp32", "rows": "i32", "segments": "i32"}
        constants = {"D": 768, "ROWS": 8, "BLOCK": 1024, "SEGMENTS": output.SEGMENTS}
        self.compile(output._combined, types, constants)

    def few_rows(self, one_byte: int = 0) -> None:
        """The experts of a few sequences, and what they take over peers."""
        w = "*i8" if one_byte else "*fp16"
        types = dict.fromkeys(("x", "b", "out"), "*fp16") | {"w": w, "scale": "*fp32", "chosen": "*i64"}
        constants = {"CHOICES": 2, "N": 3072, "K": 768, "ACTIVATION": 2, "EXACT": False}
        constants |= {"COLUMNS": 4, "INNER": 1024} | weights_of(one_byte) | self.overlap
        self.compile(vectors._experts_up, types, constants, vectors.WARPS)
        types |= {"weights": "*fp32", "onto": "*fp16"}
        constants = {"CHOICES": 2, "N": 768, "K": 3072, "COLUMNS": 2, "INNER": 1024}
        constants |= weights_of(one_byte) | self.overlap
        self.compile(vectors._experts_down, types, constants, vectors.WARPS)

    def narrow(self, rows: int, n: int, k: int, split: bool) -> None:
        """A linear layer of ``rows`` sequences."""
        division = narrow.division_for(rows, n, k, split)
        types = dict.fromkeys(("x", "w", "b"), "*fp16")
        types |= {"out": "*fp32" if division.parts > 1 else "*fp16", "rows": "i32"}
        constants = narrow.constants(division, rows, n, k, itemsize=2) | self.overlap
        constants |= {"ACTIVATION": 2 * (not split), "EXACT": False}
        self.compile(narrow._linear, types, constants, division.warps, division.stages)

    def few_rows_over_peers(self, one_byte: int = 0) -> None:
        w = "*i8" if one_byte else "*fp16"
        types = {"x": "*fp16", "w": w, "b": "*fp16", "scale": "*fp32", "chosen": "*i32"}
        own = {"out": "*fp16", "first": "i32", "held": "i32"}
        constants = {"K": 2, "N": 3072, "D": 768, "ACTIVATION": 2, "EXACT": False, "COLUMNS": 4}
        constants |= {"INNER": 1024} | weights_of(one_byte) | self.overlap
        self.compile(short_peers._up, types | own, constants, vectors.WARPS)
        own = {"weights": "*fp32", "reach": "*i64", "home": "*fp16", "first": "i32", "held": "i32"}
        constants = {"ROOM": 2, "N": 768, "D": 3072, "COLUMNS": 4, "INNER": 1024}
        constants |= weights_of(one_byte) | self.overlap
        self.compile(short_peers._down, types | own, constants, vectors.WARPS)

    def whole_step(self, kind: str, one_byte: int = 0, ranks: int = 1, dim: int = 768) -> None:
        """A decode step in one launch, of the 15B's shape, or with 1,024 dims of the 52B's."""
        types = dict.fromkeys(("embed", "out", "kv", "qkv", "logits", "gain", "shift", "output"), f"*{kind}")
        types |= dict.fromkeys(("tokens", "table", "count", "lengths", "residual"), "*i64")
        types |= {"positions": "*fp32"} | dict.fromkeys(("slots", "first", "last"), "i32")
        types |= dict.fromkeys(("embed_scale", "eps", "gate_eps", "scale"), "fp32")
        types |= dict.fromkeys(("rank", "first_expert", "held"), "i32")
        sizes = one_launch.Sizes(
            d=dim, h=dim // 64, c=64, f=4 * dim, e=512, v=50_264, k=2, activation=2, exact=False, half=False, brain=False,
            one_byte=one_byte, ptx=one_byte > 0, ranks=ranks, programs=132, of_a_choice=66 if dim == 768 else 132, **one_launch.FORM,
        )  # fmt: skip
        constants = {"ONLY": -1, "DENSE": True, "MOE": True, "s": sizes}
        if ranks == 1:
            constants["post"] = None
        else:
            types["post"] = "*i64"
            given = ("table", "count", "embed", "post", "rank", "first_expert", "held", "first", "last")
            self.compile(one_kernel.serve, {name: types[name] for name in given}, constants, sizes.warps)
        self.compile(one_kernel.step, types, constants, sizes.warps)


def without(types: dict[str, str], *names: str) -> dict[str, str]:
    return {name: kind for name, kind in types.items() if name not in names}


def weights_of(one_byte: int) -> dict:
    return {"ONE_BYTE": one_byte, "PTX": one_byte > 0} | ({} if one_byte else {"scale": None})


def compile_all(target: Target) -> None:
    """All kernels; of the larger ones some variants for Hopper only, since compiling takes its time."""
    most = target.capability == 90
    # 89 has the cuts of 120, and the matrix instructions of 80.
    if target.capability != 89:
        for cut in cuts.built_in("", "float16", target.shared):
            target.grouped("fp16", cut)
        for cut in cuts.built_in("", "int8", target.shared):
            target.grouped("fp16", cut, 1)
    target.grouped("fp16", cuts.built_in("", "fp8", target.shared)[0], 2)
    for kind, largest in ((tl.int8, 127.0), (tl.float8e4nv, 448.0)):
        if kind == tl.int8 or target.capability >= 89:
            types = {"table": "*i64", "count": "i32"}
            constants = {"SOURCE": tl.float16, "KIND": kind, "LARGEST": largest, "WHOLE": kind == tl.int8}
            constants |= {"TINY": 2.0**-126, "MATRICES": 64, "COLUMNS": 4096}
            target.compile(rounding._quantise, types, constants, rounding.WARPS)
    if target.capability >= 90 and target.shared >= batch_step.SHARED:
        for rows, n, k, split in ((8, 2304, 768, False), (64, 768, 3072, True), (64, 50_264, 768, False)):
            target.narrow(rows, n, k, split)
    if target.capability in (80, 89, 100):
        # The kernels below have no matrix instructions, but for Hopper's: what compiles for 75, 90 and 120 compiles between.
        return
    if most:
        for kind in ("fp16", "bf16"):
            target.specialised(kind, cuts.Cut(cuts.ANY, cuts.ANY, cuts.SPECIALISED, cuts.SPECIALISED))
            target.output(kind)
            target.streamed(kind)
        target.grouped("fp16", cuts.CUTS[-1], over_peers=True)
        target.grouped("fp16", cuts.ONE_BYTE_CUTS[-1], 1, over_peers=True)
        target.grouped("fp16", cuts.CUTS[0], over_peers=True, sorted_rows=False)
        target.grouped("bf16", cuts.CUTS[-1])
        target.grouped("bf16", cuts.ONE_BYTE_CUTS[0], 1)
        target.grouped("fp32", cuts.PLAIN)
    for one_byte in (0, 1, 2) if most else (0, 1):
        target.few_rows(one_byte)
        target.few_rows_over_peers(one_byte)
    # A whole step takes as long as all other kernels together: 120 has the least shared memory of its GPUs.
    if target.capability in (90, 120):
        target.whole_step("fp16")
    if most:
        target.whole_step("fp16", ranks=8, dim=1024)
        target.whole_step("bf16", 1)
    for probs in ("fp32", "fp16"):
        types = {"logits": "*fp16", "chosen": "*i64", "tokens": "i32", "eps": "fp32"}
        types |= dict.fromkeys(("probs", "gate_probs", "weights"), f"*{probs}")
        target.compile(
            gate._choose, types, {"E": 512, "K": 2, "ROWS": gate.ROWS, "BLOCK": 512} | target.overlap, 1
        )
    kind = "*bf16" if target.capability >= 80 else "*fp16"
    types = {"logits": kind, "targets": "*i64", "found": "*fp32"}
    target.compile(
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
    target.compile(tiles._by_expert, types, {"CHOICES": 128}, 1)
    target.counting()
    types = {"x": "*fp16", "found": "*fp16", "order": "*i64", "counts": "*i64", "experts": "i32"}
    constants = {"CHOICES": 2, "D": 768, "ROWS": ordered.ROWS, "BLOCK": 1024, "EXPERTS": 512}
    target.compile(ordered._in_order, types, constants)
    types = {"counts": "*i64", "table": "*i32", "choices": "i32", "experts": "i32", "width": "i32"}
    target.compile(tiles._tiles, types, {"ROWS": 16, "EXPERTS": 512})
    types = dict.fromkeys(("qkv", "kv", "out"), "*fp16") | {
        "lengths": "*i64",
        "slots": "i32",
        "scale": "fp32",
    }
    for slots, warps in (*attention.BLOCKS.values(), attention.MANY):
        constants = {"H": 12, "C": 64, "BLOCK": 64, "SLOTS": slots} | target.overlap
        target.compile(attention._attend_one, types, constants, warps)
    for (dim, keys), kind in itertools.product(flash.KEYS.items(), ("fp16", "bf16") if most else ()):
        types = {"queries": f"tensordesc<{kind}[1,{flash.QUERIES},{dim}]>", "out": f"*{kind}"}
        types |= {"keys": f"tensordesc<{kind}[1,{keys},{dim}]>"}
        types |= {"tokens": "i32", "tiles": "i32", "scale": "fp32"}
        constants = {"H": 768 // dim, "C": dim, "QUERIES": flash.QUERIES, "KEYS": keys}
        for under_way in (2, 3):
            target.compile(flash._attend_blocks, types, constants, flash.WARPS, under_way)
    types = dict.fromkeys(("x", "pending", "weight", "bias", "total", "normed"), "*fp16")
    types |= {"rows": "i32", "eps": "fp32"}
    constants = {"PARTS": 2, "D": 768, "ROWS": norm.ROWS, "BLOCK": 1024} | target.overlap
    target.compile(norm._add_norm, types, constants)
    types = {"logits": "*fp16", "parts": "*fp32", "rows": "i32"}
    constants = {"VOCAB": 50_264, "STRIDE": 50_264, "PAD": 1, "PART": 1571, "BLOCK": 2048, "PARTS": 32}
    target.compile(logprobs._best_of_part, types, constants | target.overlap)
    types = {"parts": "*fp32", "found": "*i64", "logprobs": "*fp32", "rows": "i32"}
    target.compile(logprobs._best_of_row, types, {"PARTS": 32} | target.overlap, 1)
    types = {"parts": "*fp32"} | dict.fromkeys(("rows", "slots"), "i32")
    types |= dict.fromkeys(("read", "lengths", "before", "words"), "*i64")
    target.compile(logprobs._feed_back, types, {"PARTS": 32, "ROOM": 128} | target.overlap, 1)
    types = {"tokens": "*i64", "table": "*fp16", "places": "*fp32", "lengths": "*i64", "out": "*fp16"}
    types |= {"scale": "fp32", "first": "i32"}
    target.compile(embedding._embedded, types, {"D": 768, "BLOCK": 1024} | target.overlap)
    types = {"chosen": "*i64", "weights": "*fp32", "order": "*i64", "rounded": "*fp16", "table": "*i32"}
    types |= dict.fromkeys(("choices", "experts"), "i32")
    target.compile(tiles._planned, types, {"CHOICES": 128, "ROWS": 16} | target.overlap, 1)
    for rows, k, n, columns in ((1, 768, 2304, 4), (4, 768, 512, 1), (1, 3072, 768, 4)):
        types = dict.fromkeys(("x", "w", "b", "gain", "shift", "normed", "onto", "out"), "*fp16")
        types |= {"rows": "i32", "eps": "fp32"}
        constants = {"N": n, "K": k, "ACTIVATION": 2, "EXACT": False, "ROWS": rows, "COLUMNS": columns}
        constants |= {"INNER": 1024} | target.overlap
        constants |= {"onto": None} if k == 768 else {"gain": None, "shift": None}
        target.compile(vectors._linear, types, constants, vectors.WARPS)
    waits = {
        "flags": "*i32",
        "reach": "*i64",
        "times": "*i32",
        "gave_up": "*i32",
        "rank": "i32",
        "limit": "i64",
    }
    ways = {"W": 8, "RANKS": 8, "TIMED": True}
    target.compile(peers._meet, waits, ways, 1)
    types = {"x": "*fp16", "order": "*i64", "counts": "*i64", "weights": "*fp16", "rows": "i32"}
    types |= {
        "x_out": "*fp16",
        "order_out": "*i32",
        "starts_out": "*i32",
        "weights_out": "*fp32",
        "home": "*fp16",
    }
    constants = {"E": 512, "K": 2, "D": 768, "BLOCK": 1024, "EXPERTS": 512}
    target.compile(peers._publish, types, constants)
    types = {
        "order": "*i32",
        "starts": "*i32",
        "reach": "*i64",
        "out": "*i32",
        "table": "*i32",
        "total": "*i32",
    }
    types |= dict.fromkeys(("first", "held", "room", "width"), "i32")
    constants = {"W": 8, "RANKS": 8, "EXPERTS": 64, "ROWS": 16, "SEGMENT": peers.SEGMENT}
    target.compile(peers._merge, types, constants)
    types = {"x": "*fp16", "weights": "*fp32", "reach": "*i64", "order": "*i32", "total": "*i32"}
    types |= {"rows_out": "*fp16", "weights_out": "*fp32", "room": "i32"}
    target.compile(peers._pull, types, {"K": 2, "D": 768, "ROWS": peers.PULLED, "BLOCK": 1024})
    target.compile(batch_peers._meet_home, waits, ways | target.overlap, 1)
    types = {"chosen": "*i32", "order": "*i32", "table": "*i32"} | waits
    types |= dict.fromkeys(("first", "held", "width"), "i32")
    constants = ways | {"PLACES": 1024, "BLOCK": 1024, "ROWS": 16, "EXPERTS": 64} | target.overlap
    target.compile(batch_peers._meet_and_plan, without(types, "reach", "rank"), constants)
    types = (
        waits | dict.fromkeys(("x", "home", "weight", "bias", "total", "normed"), "*fp16") | {"eps": "fp32"}
    )
    target.compile(
        batch_peers._collect_norm, types, ways | {"K": 2, "D": 768, "BLOCK": 1024} | target.overlap
    )
    types = waits | {"logits": "*fp16", "x": "*fp16", "chosen": "*i32", "weights": "*fp32", "x_out": "*fp16"}
    types |= {"rows": "i32", "eps": "fp32"}
    constants = {"E": 512, "K": 2, "D": 768, "MOST": 64, "EXPERTS": 512, "BLOCK": 1024, "W": 8, "RANKS": 8}
    constants |= {"HALF": True, "BRAIN": False} | target.overlap
    own = without(types, "gave_up", "limit")
    target.compile(batch_peers._send, own, constants | {"numbers": None}, 1)
    target.compile(batch_peers._send, own | {"numbers": "*i64"}, constants, 1)
    constants = ways | {"E": 512, "K": 2, "D": 768, "MOST": 2, "ROWS": 2, "EXPERTS": 512, "BLOCK": 1024}
    constants |= {"HALF": True, "BRAIN": False} | target.overlap
    target.compile(short_peers._hand_out, types, constants, vectors.WARPS)
    types = waits | {"home": "*fp16", "onto": "*fp16", "out": "*fp16", "rows": "i32"}
    constants = ways | {"K": 2, "D": 768, "ROWS": 2, "BLOCK": 1024} | target.overlap
    target.compile(short_peers._collect, types, constants, vectors.WARPS)


if __name__ == "__main__":
    for capability in sys.argv[1:] or SHARED:
        compile_all(Target(int(capability)))
