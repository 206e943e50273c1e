import dataclasses
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from synthetic_traces import synthetic

from moekit.notebook import coloured_text, routing_plots
from moekit.notebook.pieces import pieces, visible_pieces
from moekit.routing import metrics


@pytest.fixture(scope="module")
def small():
    return synthetic(tokens=600, layers=(1, 3, 5), experts=16, block=100)


def with_experts(trace, experts, **other):
    return dataclasses.replace(trace, experts=np.asarray(experts, np.int16), **other)


class Letters:
    """A codec whose pieces are awkward in HTML."""

    def pieces(self, ids):
        return [["<b>", " a&b", "</s>", '"q"'][i % 4] for i in ids]


def test_load_is_sorted_and_has_its_baseline(small):
    trace, _ = small
    heat, curve = routing_plots.load_heatmap(trace).axes[:2]
    shown = 2.0 ** heat.images[0].get_array()
    assert shown.shape == (3, 16) and (np.diff(shown, axis=1) <= 0).all()
    busiest = np.bincount(trace.experts[:, 1].ravel(), minlength=16).max() / (600 * 2 / 16)
    assert np.isclose(shown[1, 0], busiest)
    counts = np.bincount(trace.experts[:, 1].ravel(), minlength=16)
    named = [int(text.get_text()) for text in heat.texts[16:32]]
    assert sorted(named) == list(range(16)) and (np.diff(counts[named]) <= 0).all()
    lines = {line.get_label(): line.get_ydata() for line in curve.lines}
    assert np.isclose(np.nanmax(lines["layer 3"]), busiest)
    assert any(np.array_equal(y, [1, 1]) for y in lines.values())
    assert [c.get_label() for c in curve.collections] == ["uniform random routing, 90 %"]


def test_the_band_of_the_load_is_of_different_experts_in_each_token():
    """Where each token chooses all experts, no routing is uneven."""
    trace, _ = synthetic(tokens=100, layers=(1,), experts=2, choices=2)
    _, curve = routing_plots.load_heatmap(trace).axes[:2]
    [band] = curve.collections
    assert np.unique(band.get_paths()[0].vertices[:, 1]).tolist() == [1]


def test_first_and_second_choices_are_each_experts_shares():
    trace, _ = synthetic(tokens=900, layers=(1, 3), experts=16, block=100)
    figure = routing_plots.choices(trace)
    assert [ax.get_visible() for ax in figure.axes] == [True, True]
    dots = figure.axes[1].lines[0]
    for axis, choice in ((dots.get_xdata(), 0), (dots.get_ydata(), 1)):
        share = np.bincount(trace.experts[:, 1, choice], minlength=16) / 9
        assert np.allclose(axis, share)
    bars = [bar[:, 0] for bar in figure.axes[1].collections[0].get_segments() if len(bar)]
    table = metrics.load(trace, choice=0).query("layer == 3")
    assert np.allclose(bars, 100 * table[["low", "high"]].dropna()) and len(bars) > 10
    assert "rank correlation" in figure.axes[1].get_title(loc="left")
    with pytest.raises(ValueError, match="no second one; expected two or more"):
        routing_plots.choices(synthetic(tokens=64, choices=1)[0])


def test_drops_are_those_of_the_trace():
    trace, _ = synthetic(tokens=64, layers=(1,), experts=4, block=16)
    kept = np.ones((64, 1, 2), bool)
    kept[trace.position == 15, 0, 1] = False
    trace = dataclasses.replace(trace, kept=kept)
    figure = routing_plots.drops_by_position(trace, bins=8)
    first, second = figure.axes[0].lines
    assert not np.any(first.get_ydata())
    assert np.allclose(second.get_ydata(), [0] * 7 + [50])
    assert np.allclose(second.get_xdata(), np.arange(0.5, 16, 2)), "the middle of positions 0 and 1 is 0.5"
    assert "3.1 %" in figure.axes[0].get_title(loc="left")


def test_drops_and_their_baseline_are_of_the_tokens_that_count():
    """The samples of 16 begin with 8 tokens that were read, whose choices are dropped; the last two are new in one alone."""
    trace, _ = synthetic(tokens=64, layers=(1,), experts=4, block=16)
    kept = np.ones((64, 1, 2), bool)
    kept[trace.position < 8] = False
    known = {"capacity_token_fraction": 0.25, "groups": [[1, 16, 4]]}
    generated = (trace.position >= 8) & ((trace.position < 14) | (trace.sample == 2))
    read = dataclasses.replace(trace, kept=kept, meta=known)
    written = dataclasses.replace(read, generated=generated)
    axes = routing_plots.drops_by_position(written).axes[0]
    first, chance, second, _ = axes.lines
    np.testing.assert_array_equal(first.get_xdata(), np.arange(8, 16))
    np.testing.assert_array_equal(chance.get_xdata(), np.arange(16))
    assert not np.any(first.get_ydata()) and not np.any(second.get_ydata())
    table = metrics.drops(written, "position")
    np.testing.assert_allclose(np.mean([first.get_ydata(), second.get_ydata()], 0), 100 * table["value"])
    assert np.isnan(chance.get_ydata()[:8]).all()
    np.testing.assert_allclose(chance.get_ydata()[8:], 100 * metrics.drop_chance(read)[8:, 0])
    assert "0.0 %" in axes.get_title(loc="left")
    assert metrics.drops(written)["value"].tolist() == [0]
    assert metrics.drops(written, prompt=True)["value"].tolist() == [0.5]

    for line, same in zip(
        routing_plots.drops_by_position(written, prompt=True).axes[0].lines,
        routing_plots.drops_by_position(read).axes[0].lines,
        strict=True,
    ):
        np.testing.assert_array_equal(line.get_xydata(), same.get_xydata())
    # Positions 12 and 13 are of no new token.
    gap = dataclasses.replace(written, generated=generated & ((trace.position < 12) | (trace.position > 13)))
    for line in routing_plots.drops_by_position(gap).axes[0].lines:
        missing = np.isnan(line.get_ydata())
        assert set(line.get_xdata()[missing].astype(int)) - set(range(8)) == {12, 13}


def test_drops_have_a_baseline_where_the_capacity_is_known():
    trace, _ = synthetic(tokens=64, layers=(1,), experts=4, block=16)
    known = {"capacity_token_fraction": 0.25, "groups": [[1, 16, 4]]}
    trace = dataclasses.replace(trace, meta=known)
    chance = metrics.drop_chance(trace)
    assert chance.shape == (16, 2)
    assert (chance[:4, 0] == 0).all() and chance[15, 0] > 0  # the first four always find one of four places
    assert (chance[:, 1] >= chance[:, 0]).all()
    assert len(routing_plots.drops_by_position(trace).axes[0].lines) == 4
    trained = dataclasses.replace(trace, meta=known | {"capacity_token_fraction": -1.0})
    assert routing_plots.drops_by_position(trained).get_suptitle().endswith("capacity: training")
    assert metrics.drop_chance(synthetic(tokens=64)[0]) is None


def test_table_and_picture_have_the_same_baseline():
    """Groups of three shapes, the commonest of which is not that of the longest samples."""
    groups = [[1, 16, 1], [4, 8, 5], [2, 12, 2]]
    samples = [16, *[8] * 20, *[12] * 4]
    trace, _ = synthetic(tokens=sum(samples), layers=(1,), experts=4, block=1)
    columns = {
        "sample": np.repeat(np.arange(len(samples)), samples).astype(np.int32),
        "position": np.concatenate([np.arange(n) for n in samples]).astype(np.int32),
        "meta": {"capacity_token_fraction": 0.25, "groups": groups},
    }
    trace = dataclasses.replace(trace, **columns)
    lines = routing_plots.drops_by_position(trace).axes[0].lines
    picture = [line.get_ydata() / 100 for line in lines if line.get_linestyle() == ":"]
    table = metrics.drops(trace, "position", bins=16)["chance"]
    np.testing.assert_allclose(np.mean(picture, axis=0), table)
    # By hand: position 12 is in the one sample of 16 tokens only; position 8 in that and in 2 groups of 2 x 12.
    alone = metrics.drop_probability(16, 4, 2, 4)
    pair = metrics.drop_probability(24, 4, 2, 6).reshape(2, 12, 2)
    np.testing.assert_allclose([line[12] for line in picture], alone[12])
    at_8 = (alone[8] + 2 * pair[:, 8].sum(axis=0)) / 5
    np.testing.assert_allclose([line[8] for line in picture], at_8)
    by_choice = metrics.drops(trace, "choice")["chance"]
    np.testing.assert_allclose(by_choice, [line[trace.position].mean() for line in picture])


def test_coactivation_puts_partners_side_by_side():
    rng = np.random.default_rng(0)
    trace, _ = synthetic(tokens=800, layers=(1,), experts=8)
    pairs = np.array([[0, 5], [1, 6], [2, 7], [3, 4]])[rng.integers(0, 4, 800)]
    figure = routing_plots.coactivation(with_experts(trace, pairs[:, None]))
    heat, bars = figure.axes[:2]
    order = [int(t.get_text()) for t in heat.get_xticklabels()]
    for a, b in ([0, 5], [1, 6], [2, 7], [3, 4]):
        assert abs(order.index(a) - order.index(b)) == 1
    assert {t.get_text() for t in bars.get_yticklabels()} == {"0 + 5", "1 + 6", "2 + 7", "3 + 4"}
    assert np.isclose(bars.lines[0].get_xdata()[0], 100 / 28)  # one pair of 28


@pytest.mark.parametrize("choices", [2, 3, 4])
def test_a_pair_is_as_common_in_uniform_routing_as_by_hand(choices):
    """Of all ways to choose K of six experts, so many hold the first two."""
    trace, _ = synthetic(tokens=60, layers=(1,), experts=6, choices=choices)
    ways = list(itertools.combinations(range(6), choices))
    both = sum({0, 1} <= set(way) for way in ways) / len(ways)
    bars = routing_plots.coactivation(trace).axes[1]
    assert bars.lines[0].get_xdata()[0] == pytest.approx(100 * both)


def test_pictures_of_written_text_are_those_of_its_new_tokens():
    trace, _ = synthetic(tokens=800, layers=(1, 3), experts=8, block=100)
    written = dataclasses.replace(trace, generated=trace.position >= 70)
    new = trace.select(mask=written.generated)
    for picture in (routing_plots.load_heatmap, routing_plots.coactivation):
        found, wanted = (picture(one).axes for one in (written, new))
        assert np.allclose(found[0].images[0].get_array(), wanted[0].images[0].get_array(), equal_nan=True)
        assert found[0].get_title() == wanted[0].get_title()
        for line, same in zip(found[1].lines, wanted[1].lines, strict=True):
            assert np.allclose(line.get_data(), same.get_data(), equal_nan=True)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("load_heatmap", {"seed": 0.5}, "seed=0.5: expected a whole number"),
        ("choices", {"named": None}, "named=None: expected a whole number"),
        ("drops_by_position", {"bins": 0}, "bins=0: expected a whole number of at least 1"),
        ("coactivation", {"pairs": "x"}, "pairs='x': expected a whole number"),
        ("paths", {"start": -1}, "start=-1: expected a whole number of at least 0"),
        ("paths", {"codec": "demo"}, "codec='demo': expected a model's codec or None"),
        ("text_figure", {"max_tokens": -3}, "max_tokens=-3: expected a whole number of at least 1"),
        ("text_html", {"by": "domain"}, "by='domain': expected one of expert, confidence"),
        ("text_html", {"sample": 1.5}, "sample=1.5: expected a whole number"),
    ],
)
def test_pictures_say_what_they_do_not_take(small, name, asked, said):
    trace, _ = small
    picture = getattr(routing_plots, name)
    with pytest.raises(ValueError, match=re.escape(said)):
        picture(trace, **asked)
    with pytest.raises(ValueError, match="^trace='demo': expected a trace"):
        picture("demo")
    with pytest.raises(ValueError, match="the trace has no tokens, expected at least one"):
        picture(trace.select(samples=[]))


def test_coactivation_needs_two_choices():
    trace, _ = synthetic(tokens=64, choices=1)
    with pytest.raises(ValueError, match="one choice"):
        routing_plots.coactivation(trace)


def test_domains_stand_by_the_experts_they_use():
    trace, _ = synthetic(tokens=400, layers=(1, 3), experts=6)
    domains = np.array(["a", "b"])[np.arange(400) % 2]
    experts = np.where(domains == "a", 4, 1)[:, None, None] + np.zeros((400, 2, 2), int)
    experts[..., 1] += 1
    figure = routing_plots.domain_heatmap(with_experts(trace, experts), domains)
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()][:4] in (["4", "5", "1", "2"], ["5", "4", "2", "1"])
    shown = ax.images[0].get_array()
    assert np.allclose(2.0 ** shown[:, :4], [[2, 2, 2**-6, 2**-6], [2**-6, 2**-6, 2, 2]])
    assert "against the expert's own load" in figure.get_suptitle()
    uniform = routing_plots.domain_heatmap(
        with_experts(trace, experts), domains, against="uniform", mark=False
    )
    shown = uniform.axes[0].images[0].get_array()
    assert np.allclose(2.0 ** shown[:, :4], [[3, 3, 2**-6, 2**-6], [2**-6, 2**-6, 3, 3]])
    assert "against uniform routing" in uniform.get_suptitle()
    assert np.ma.getmaskarray(shown)[:, 4:].all()  # experts that nobody chose
    with pytest.raises(ValueError, match="label"):
        routing_plots.domain_heatmap(trace, domains[:-1])


def test_dots_are_those_of_the_test_that_is_given(small):
    trace, domains = small
    tested = metrics.permutation(trace, domains, choice=0, draws=19).assign(survives=False)
    tested.loc[[3, 40], "survives"] = True
    figure = routing_plots.domain_heatmap(trace, domains, choice=0, tested=tested)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    dots = set()
    for layer, ax in zip(trace.layers, panels, strict=True):
        domain, expert = (
            [tick.get_text() for tick in ticks] for ticks in (ax.get_yticklabels(), ax.get_xticklabels())
        )
        offsets = ax.collections[0].get_offsets().astype(int)
        dots |= {(layer, domain[row], int(expert[column])) for column, row in offsets}
    keys = tested.loc[[3, 40], ["layer", "domain", "expert"]]
    assert dots == set(keys.itertuples(index=False, name=None))
    for other in (tested.iloc[1:], tested.drop(columns="survives"), "tested"):
        with pytest.raises(ValueError, match="^tested=.*expected what metrics.permutation gives of the same"):
            routing_plots.domain_heatmap(trace, domains, choice=0, tested=other)


def test_one_domain_has_no_bits_to_tell(small):
    trace, _ = small
    assert "of the domain's 0.00 bits" in routing_plots.domain_heatmap(trace, ["all"] * 600).axes[
        0
    ].get_title(loc="left")


def test_paths_strike_what_was_not_dispatched(small):
    trace, _ = small
    figure = routing_plots.paths(trace, sample=2, start=60, tokens=20)
    part = trace.select(samples=2)
    part = part.select(mask=(part.position >= 60) & (part.position < 80))
    ax = figure.axes[0]
    assert len(ax.lines) == (~part.kept).sum()
    assert figure.get_suptitle().endswith("struck through where not dispatched")
    assert [t.get_text() for t in ax.texts][: 20 * 2] == [str(e) for e in part.experts[:, 0].ravel()]
    with pytest.raises(ValueError, match="no tokens of sample 99"):
        routing_plots.paths(trace, sample=99)


@pytest.mark.parametrize("by", ["expert", "confidence"])
def test_text_survives_conversion(small, by):
    trace, _ = small
    shown = routing_plots.text_html(trace, Letters(), sample=1, layer=3, by=by).data
    assert not re.search(r"<(style|script|link)|class=|url\(", shown)
    assert "&lt;b&gt;" in shown and "a&amp;b" in shown and "<b>sample 1, layer 3</b>" in shown
    assert shown.count("<b>") == 1
    assert shown.count(" not dispatched") == (~trace.select(samples=1, layers=3).kept).sum() > 0
    assert shown.count("<br>") == sum(t % 4 == 2 for t in trace.select(samples=1).token)


def test_text_colours_the_eight_busiest(small):
    trace, _ = small
    first = trace.select(samples=1).experts[:, 0, 0]
    shown = routing_plots.text_html(trace, sample=1).data
    for expert in np.unique(first):
        rank = (np.bincount(first) > np.bincount(first)[expert]).sum()
        styles = {
            style.split(";")[0] for style in re.findall(rf'title="E{expert} [^"]*" style="([^"]*)"', shown)
        }
        assert len(styles) == 1
        if rank >= 8:
            assert not styles.pop().startswith("background")
    with pytest.raises(ValueError, match="by='colour'"):
        routing_plots.text_html(trace, by="colour")
    with pytest.raises(ValueError, match="no sample 77"):
        routing_plots.text_html(trace, sample=77)


@pytest.mark.parametrize("experts, choices", [(512, 2), (4, 1)])
def test_every_picture_renders(experts, choices, tmp_path):
    trace, domains = synthetic(
        tokens=2000, layers=(1, 3), experts=experts, choices=choices, block=500, vocab=500
    )
    figures = [
        routing_plots.load_heatmap(trace),
        routing_plots.drops_by_position(trace),
        routing_plots.domain_heatmap(trace, domains),
        routing_plots.paths(trace, tokens=5),
        routing_plots.text_figure(trace, Letters(), max_tokens=30),
        routing_plots.text_figure(trace, by="confidence", max_tokens=30),
    ]
    if choices == 2:
        figures.append(routing_plots.coactivation(trace, layer=3))
    for figure in figures:
        figure.savefig(tmp_path / "picture.png")


@pytest.mark.parametrize("name", ["changes", "written"])
def test_the_legend_hides_no_interval(name):
    rows = range(3)
    ends = {
        f"{kind}{end}": [0.1, 0.5, 0.99]
        for kind in ("", "ratio_", "read_", "written_")
        for end in ("low", "high")
    }
    table = pd.DataFrame(ends | dict.fromkeys(("perplexity_ratio", "read", "written", "load"), 0.5))
    table = table.assign(domain=[*"abc"], survives=True, layer=1, expert=rows)
    figure = (
        routing_plots.changes({"a": table, "b": table}) if name == "changes" else routing_plots.written(table)
    )
    figure.draw_without_rendering()
    [legend] = [*figure.legends, *filter(None, [figure.axes[0].get_legend()])]
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    assert figure.axes[0].get_ylim() == pytest.approx((-0.6, 2.6)), "no row lies on the axis"


def test_coloured_text_is_wrapped_between_pieces():
    spans = [
        coloured_text.Span(*each) for each in (("ab", "#000000"), (" cd", "#FFFFFF"), ("x¶\n",), (" ef",))
    ]
    figure = coloured_text.figure(spans, columns=4)
    face = [t for t in figure.axes[0].texts if t.get_family() == ["DejaVu Sans Mono"]]
    where = {t.get_text(): (t.get_position()[0] - 0.5, int(t.get_position()[1]), t.get_color()) for t in face}
    assert where["a"] == (0, 0, "white") and where["c"] == (0, 1, "#111111")
    assert (
        where["x"] == (2, 1, "#111111")
        and where["¶"] == (3, 1, "#111111")
        and where["e"] == (1, 2, "#111111")
    )
    assert len(figure.axes[0].patches) == 2


def test_pieces_of_tokens_that_nobody_told():
    assert pieces(None, [7, -1, 8]) == [" 7", "?", " 8"]
    assert pieces(Letters(), [-1, 1, -1]) == ["?", " a&b", "?"]
    assert visible_pieces(Letters(), [2, 0]) == ["¶\n", "<b>"]
