"""Exchange through the peers' memory: kernels interpreted on CPU ranks whose buffers are shared files."""

import os
from dataclasses import replace

import pytest
import torch
from eager_graph import EagerGraph

INTERPRET = "TRITON_INTERPRET"
pytest.importorskip("triton")

from triton_interpreter import replace_once

from moekit import ranks
from moekit.nn import graphs
from moekit.nn.cache import Cache
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import Local, owned
from moekit.nn.passes import Pass
from moekit.nn.quantise import KINDS
from moekit.nn.transformer import Transformer
from moekit.symbols import PAD
from moekit.worker.greedy import Greedy

pytestmark = pytest.mark.slow
E, D, F, K = 10, 24, 40, 2
ONE_BYTE = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1"
    yield
    if before is None:
        del os.environ[INTERPRET]
    else:
        os.environ[INTERPRET] = before


@pytest.fixture(scope="module", params=[2, 3])
def pool(request, interpreted):
    with ranks.start(request.param, "cpu") as found:
        found.call(replace_once)
        yield found


def experts(held: range, kind: torch.dtype | None = None):
    """The experts ``held`` of E that every rank draws alike, with numbers of ``kind``."""
    from moekit.nn.experts import Experts, QuantisedExperts

    generator = torch.Generator().manual_seed(1)
    found = Experts(len(held), D, F, "gelu").requires_grad_(False)
    for own in found.tensors.values():
        drawn = torch.randn(E, *own.shape[1:], generator=generator) * 0.1
        own.copy_(drawn[held.start : held.stop])
    return found if kind is None else QuantisedExperts.of(found, kind)


def assigned(rows: int, dropped: float, seed: int):
    """Rows [N, D] and their assignment to E experts, a share of the choices dropped."""
    from moekit.nn.experts import Assignment
    from moekit.nn.gate import sort_by_expert

    generator = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(rows, D, generator=generator), torch.randn(rows, E, generator=generator)
    best = logits.topk(K, dim=-1)
    kept = torch.rand(rows, K, generator=generator) >= dropped
    order, counts = sort_by_expert(torch.where(kept, best.indices, E).flatten(), E)
    weights = best.values.softmax(dim=-1) * kept
    return x, Assignment(order, counts, K, weights.flatten())


def dispatched(
    rank: ranks.Rank, most: int, times: int, kind: torch.dtype | None = None
) -> tuple[float, bool]:
    """The largest difference between all experts here and those of all ranks, over several exchanges, and a full end."""
    from moekit.nn.kernels.peer_dispatch import PeerDispatch

    dispatch = PeerDispatch(E, K, D, torch.float32, rank.device)
    mine = experts(owned(E, rank.world_size, rank.rank), kind)
    worst = 0.0
    for time in range(times):
        # Not as many rows on each rank; the last rank has none at first.
        rows = max(0, most - 2 * rank.rank) if time else most * (rank.rank < rank.world_size - 1)
        x, assignment = assigned(rows, 0.3, 7 * time + rank.rank)
        found = dispatch(mine, x, assignment, most)
        wanted = experts(range(E), kind)(x, assignment)
        assert found.shape == wanted.shape == (rows * K, D)
        worst = max(worst, (found - wanted).abs().max().item() if rows else 0.0)
    dispatch.check()
    return worst, len(dispatch.boxes) == 1


@pytest.mark.parametrize("most", [1, 5, 16])
def test_rows_go_to_their_experts_and_come_home(pool, most):
    for worst, one_box in pool.call(dispatched, most, 3, timeout=120):
        assert worst < 1e-6 and one_box


@ONE_BYTE
def test_rows_go_to_experts_of_one_byte(pool, kind):
    for worst, one_box in pool.call(dispatched, 5, 2, kind, timeout=240):
        assert worst < 1e-6 and one_box


CONFIG = ModelConfig(
    layers=4,
    dim=D,
    ffn_dim=F,
    heads=4,
    vocab_rows=50,
    input_dim=D,
    output_dim=D,
    max_positions=64,
    activation="gelu",
    pre_norm=True,
    moe_freq=2,
    experts=E,
    second_expert="all",
)


def whole() -> Transformer:
    torch.manual_seed(3)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.requires_grad_(False)


def over_ranks(rank: ranks.Rank, kind: torch.dtype | None = None) -> tuple[Transformer, Transformer]:
    """A rank's part of the model, with the kernels, and the whole plain one."""
    from moekit.nn.experts import QuantisedExperts
    from moekit.nn.kernels.peer_dispatch import PeerDispatch

    plain, held = whole(), owned(E, rank.world_size, rank.rank)
    model = Transformer(CONFIG, len(held), PeerDispatch(E, K, D, torch.float32, rank.device))
    given = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        own = given[name][held.start : held.stop] if ".experts." in name else given[name]
        parameter.data.copy_(own)
    for layer in (*model.layers, *plain.layers) if kind is not None else ():
        if layer.moe is not None:
            layer.moe.experts = QuantisedExperts.of(layer.moe.experts, kind)
    return model.requires_grad_(False).use("triton"), plain


def stepped(
    rank: ranks.Rank,
    sequences: list[int],
    kind: torch.dtype | None = None,
    programs: int | None = None,
    fits: bool = True,
    few: bool = False,
) -> float:
    """The largest difference of a few decode steps in the fused kernels over ranks from the plain model alone.

    Args:
        programs: of the kernel that makes a step in one launch; None: other kernels make it.
        fits: whether a half of its programs can take a choice; else all take turns at each.
        few: whether the kernels for a few sequences make the steps, also of more than one.
    """
    from moekit.nn.kernels import batch_peers, batch_step, one_launch, short_step

    own_sent = batch_peers.sent
    one_launch.MOST = 48 * 768 if fits else 1
    model, plain = over_ranks(rank, kind)
    count, most = sequences[rank.rank], max(sequences)
    assert short_step.fits(model, most) == (most <= 4) and batch_step.fits(model, most) == (most >= 2)
    sent = []
    # Which layers write rows to the peers.
    batch_peers.sent = lambda moe, *how: sent.append(moe.index) or own_sent(moe, *how)
    try:
        worst = apart(model, plain, rank, count, most, programs, few)
    finally:
        batch_peers.sent = own_sent
    assert sent == ([] if few or most == 1 else [1, 3] * 3)
    return worst


def apart(
    model: Transformer,
    plain: Transformer,
    rank: ranks.Rank,
    count: int,
    most: int,
    programs: int | None,
    few: bool,
) -> float:
    """How far the logits of some steps of ``model``, over ranks, are from those of ``plain``."""
    from moekit.nn.kernels import one_launch, short_step

    caches = [Cache(CONFIG, count, 64, rank.device, torch.float32) for _ in range(2)]
    tokens = torch.randint(4, 50, (count, 4), generator=torch.Generator().manual_seed(rank.rank))
    worst = 0.0
    for step in range(4 if programs is None else 3):
        read = tokens[:, step]
        asked = Pass(groups=max(count, 1), cache=caches[0], rows_expected=most)
        if step == 0:
            # Something has to be in the cache, as after a prompt.
            found = model(read[:, None], asked) if count else model.serve(most)
            found = None if found is None else model.logits(found[:, 0])
        elif few:
            found = short_step.read_on(model, read, caches[0], 50, most)
        elif programs is None:
            found = model.operations.read_on(model, read, asked, 50)
        else:
            found = one_launch.read_on(model, read.contiguous(), caches[0], 50, programs)
        caches[0].advance(1)
        assert (found is None) == (count == 0)
        if count:
            wanted = plain(read[:, None], Pass(groups=count, cache=caches[1]))
            caches[1].advance(1)
            worst = max(worst, (found - plain.logits(wanted[:, 0])).abs().max().item())
    model.operations.check(model)
    return worst


def greedily(rank: ranks.Rank, sequences: list[int], steps: int = 2) -> tuple[list, list]:
    """The tokens of greedy steps over ranks, in two calls that go on from one another, and those of the plain model alone."""
    model, plain = over_ranks(rank)
    count, most = sequences[rank.rank], max(sequences)
    caches = [Cache(CONFIG, count, 64, rank.device, torch.float32) for _ in range(2)]
    first = torch.randint(4, 50, (count, 2), generator=torch.Generator().manual_seed(rank.rank))
    asked = Pass(groups=max(count, 1), cache=caches[0], rows_expected=most)
    if count:
        model(first[:, :1], asked)
        plain(first[:, :1], Pass(groups=count, cache=caches[1]))
    else:
        model.serve(most)
    for cache in caches:
        cache.advance(1)
    own, graphs.Graph = graphs.Graph, EagerGraph
    try:
        step = Greedy(model, caches[0], 50, most)
    finally:
        graphs.Graph = own
    read, found = first[:, 1].contiguous(), []
    for _ in range(2):
        for _ in range(steps):
            read = step(read)
        found += (step.taken(steps) >> 32).tolist()
        read = read.clone()
    model.operations.check(model)
    wanted, read = [], first[:, 1]
    for _ in range(2 * steps if count else 0):
        logits = plain.logits(plain(read[:, None], Pass(groups=count, cache=caches[1]))[:, 0])
        caches[1].advance(1)
        logits[:, PAD] = -torch.inf
        read = logits.argmax(dim=1)
        wanted.append(read.tolist())
    return found, wanted or [[]] * (2 * steps)


@pytest.mark.parametrize("pool", [3], indirect=True)
def test_greedy_steps_over_ranks(pool):
    """The end of a step, which chooses, feeds back and counts on, behind the exchanges."""
    for found, wanted in pool.call(greedily, [2, 0, 1], timeout=240):
        assert found == wanted


# By the number of ranks. Programs of ranks that wait for one another take longest of all, so that each is tried with one number.
ONE_LAUNCH = {2: [([0, 1], 2, True), ([1, 0], 5, True)], 3: [([1, 1, 1], 5, False)]}
TWO = pytest.mark.parametrize("pool", [2], indirect=True)


def test_a_step_in_one_launch_over_ranks(pool):
    for sequences, programs, fits in ONE_LAUNCH[pool.world_size]:
        for worst in pool.call(stepped, sequences, None, programs, fits, timeout=240):
            assert worst < 1e-5, sequences


@TWO
def test_a_step_in_one_launch_over_ranks_with_experts_of_one_byte(pool):
    for worst in pool.call(stepped, [1, 0], torch.int8, 3, timeout=240):
        assert worst < 1e-5


@pytest.mark.parametrize(
    "sequences, few", [([1, 1, 1], False), ([1, 0, 0], False), ([2, 4, 1], True), ([5, 0, 1], False)]
)
def test_a_step_of_few_sequences_over_ranks(pool, sequences, few):
    for worst in pool.call(stepped, sequences[: pool.world_size], few=few, timeout=240):
        assert worst < 1e-5


@pytest.mark.parametrize("sequences", [[1, 0, 1], [5, 0, 1]])
def test_a_step_of_few_sequences_over_ranks_with_experts_of_one_byte(pool, sequences):
    for worst in pool.call(stepped, sequences[: pool.world_size], torch.int8, timeout=240):
        assert worst < 1e-5


def moe_layers(rank: ranks.Rank, config: ModelConfig, numbered: bool):
    """A MoE layer with all experts, and one with those held here; if ``numbered``, the dispatch knows experts by other numbers."""
    from moekit.nn.kernels.peer_dispatch import PeerDispatch
    from moekit.nn.transformer import MoE

    torch.manual_seed(5)
    held = owned(E, rank.world_size, rank.rank)
    plain = MoE(config, 1, E, Local())
    moe = MoE(config, 1, len(held), PeerDispatch(E, plain.rule.top_k, D, torch.float32, rank.device))
    for parameter in plain.parameters():
        parameter.data.normal_(0, 0.3)
    # The expert that has each number.
    by_number = torch.randperm(E) if numbered else torch.arange(E)
    if numbered:
        moe.numbers = by_number.argsort()
    moe.gate.weight.data.copy_(plain.gate.weight)
    for name, own in moe.experts.tensors.items():
        own.data.copy_(plain.experts.tensors[name][by_number[held.start : held.stop]])
    return plain.requires_grad_(False), moe.requires_grad_(False)


def in_turns(rank: ranks.Rank, gate: str, numbered: bool) -> float:
    """The largest difference between all experts here and those of all ranks, whose rows are written and read in turns."""
    from moekit.nn.kernels import batch_peers
    from moekit.nn.transformer import AddNorm

    plain, moe = moe_layers(rank, replace(CONFIG, gate=gate), numbered)
    norm = AddNorm(D).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    worst = 0.0
    # All but the last of these are in one mailbox; the rows of the last are alike, so that an expert has more than a tile.
    turns = [
        ([5, 0, 2], "written"),
        ([3, 4, 0], "read"),
        ([1, 16, 0], "norm"),
        ([0, 3, 6], "norm"),
        ([40, 0, 3], "norm"),
    ]
    for turn, (counts, how) in enumerate(turns):
        rows, most = counts[rank.rank], max(counts[: rank.world_size])
        x = torch.randn(rows, D, generator=torch.Generator().manual_seed(10 * turn + rank.rank))
        if most == 40:
            x = 0.01 * x + torch.linspace(-1, 1, D)
        wanted = plain(x[None], Pass())[0] if rows else x.new_empty(0, moe.rule.top_k, D)
        logits = moe.gate(x)
        if how == "read":
            found = moe.dispatched(x, moe.rule.route(logits[None], fraction=None), most)
            pairs = [(found.view_as(wanted), wanted)]
        else:
            assert batch_peers.fits(moe, most)
            coming = batch_peers.sent(moe, logits, x, most)
            if how == "written" or not rows:
                pairs = [(batch_peers.arrived(coming), wanted)]
            else:
                pairs = list(zip(batch_peers.collected(coming, x, norm), norm(x, wanted), strict=True))
        worst = max([worst, *((a - b).abs().max().item() for a, b in pairs if rows)])
    moe.dispatch.check()
    assert list(moe.dispatch.boxes) == [16, 64]
    return worst


@pytest.mark.parametrize("gate, numbered", [("top2", True), ("top1", False)])
def test_rows_are_written_and_read_in_turns(pool, gate, numbered):
    assert max(pool.call(in_turns, gate, numbered, timeout=240)) < 1e-5


def absent(rank: ranks.Rank, written: bool) -> str:
    """What a rank says whose peer does not come to an exchange."""
    from moekit.nn.kernels import batch_peers, peers

    _, moe = moe_layers(rank, CONFIG, False)
    looks, peers.LOOKS = peers.LOOKS, 50
    moe.dispatch.mailbox(4)
    peers.LOOKS = looks
    if rank.rank == 1:
        return ""
    x, assignment = assigned(2, 0.0, 1)
    if written:
        batch_peers.arrived(batch_peers.sent(moe, moe.gate(x), x, 4))
    else:
        moe.dispatch(moe.experts, x, assignment, 4)
    try:
        moe.dispatch.check()
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("written", [False, True])
def test_waiting_for_a_peer_has_an_end(pool, written):
    found = pool.call(absent, written, timeout=120)
    assert "a peer did not come to an exchange" in found[0]


def absent_from_a_step(rank: ranks.Rank) -> list[str]:
    """What a rank says, step by step, whose peer does not come to a step in one launch."""
    import triton.language as tl

    from moekit.nn.kernels import one_launch, one_peers
    from moekit.nn.kernels.peer_dispatch import PeerDispatch

    before = one_peers.LOOKS, one_peers.BETWEEN
    one_peers.LOOKS, one_peers.BETWEEN = tl.constexpr(8), tl.constexpr(4)
    held = owned(E, rank.world_size, rank.rank)
    model = Transformer(CONFIG, len(held), PeerDispatch(E, K, D, torch.float32, rank.device))
    model.requires_grad_(False).use("triton")
    one_launch.plan_of(model)
    said = []
    for _ in range(0 if rank.rank == 1 else 2):
        cache = Cache(CONFIG, 1, 64, rank.device, torch.float32)
        one_launch.read_on(model, torch.tensor([5]), cache, 50, 2)
        try:
            model.operations.check(model)
        except RuntimeError as error:
            said.append(str(error))
    one_peers.LOOKS, one_peers.BETWEEN = before
    return said


@TWO
def test_waiting_for_a_peer_in_one_launch_has_an_end(pool):
    found = pool.call(absent_from_a_step, timeout=120)
    assert len(found[0]) == 2 and all("a peer did not come to an exchange" in said for said in found[0])
    assert found[1] == []


def gave_up(rank: ranks.Rank) -> str:
    """What scoring says on a rank that has given up waiting for a peer."""
    from moekit.batches import shares, text_batches
    from moekit.worker import scoring

    rank.state["model"] = model = whole()
    model.dispatch.check = lambda: (_ for _ in ()).throw(RuntimeError("a peer did not come"))
    try:
        mine = shares(text_batches([[5, 6, 7]], 1, 64), 1)
        scoring.scores_of(rank, mine, fraction=None, vocab=50, seed=1)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_scoring_says_that_a_peer_did_not_come():
    with ranks.start(1, "cpu") as one:
        assert one.call(gave_up) == ["a peer did not come"]


def test_a_rank_that_brings_too_many_rows_is_told(pool):
    def bring(rank: ranks.Rank) -> None:
        from moekit.nn.kernels.peer_dispatch import PeerDispatch

        dispatch = PeerDispatch(E, K, D, torch.float32, rank.device)
        dispatch(experts(owned(E, rank.world_size, rank.rank)), *assigned(3, 0.0, 1), 2)

    with ranks.start(2, "cpu") as own, pytest.raises(ranks.RankError, match="3 rows where at most 2"):
        own.call(bring, timeout=60)
