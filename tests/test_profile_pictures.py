"""Pictures and tables of a profile that is known, and the widget's half in the kernel."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from made_up_profile import made_up
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from synthetic_traces import synthetic

from moekit import metrics
from moekit.notebook import profile_plots, profiling, timeline
from moekit.notebook.style import PART_COLOURS
from moekit.notebook.timeline.pack import pack
from moekit.profiling import PARTS


@pytest.fixture
def profile():
    return made_up()


def test_every_part_has_a_colour_of_its_own():
    assert set(PART_COLOURS) == set(PARTS) and len(set(PART_COLOURS.values())) == len(PARTS)


def test_tables_by_hand(profile):
    shares = profile.shares().set_index("part")
    assert shares["seconds"].to_dict() == pytest.approx(
        {"dispatch": 0.002, "experts up": 0.0045, "waiting": 0.0015}
    )
    assert shares["share"].to_dict() == pytest.approx(
        {"dispatch": 0.25, "experts up": 0.5625, "waiting": 0.1875}
    )
    assert shares["of_limit"].to_dict() == pytest.approx(
        {"dispatch": 0.1, "experts up": 1 / 3, "waiting": np.nan}, nan_ok=True
    )
    experts = profile.experts()
    assert experts["rows"].tolist() == [30, 10] and experts["seconds"].tolist() == pytest.approx(
        [0.006, 0.003]
    )
    assert experts["waiting"].tolist() == pytest.approx([0, 0.003]) and experts["busiest"].tolist() == [
        1.5,
        1.5,
    ]
    assert profile.busiest() == {1: pytest.approx(0.75)}
    assert profile.step == 0.0075 and profile.slowdown == pytest.approx(8 / 7.5)
    [row] = profiling.overview({2: profile}).to_dict("records")
    assert row == pytest.approx(
        {"blocks": 2, "ms a step": 7.5, "tokens a second": 40 / 0.0075, "slowdown": 8 / 7.5, "ms by the parts": 8,
         "limit ms": 1.7, "at work": 0.8125}
    )  # fmt: skip


def test_the_timeline_has_a_lane_a_rank_and_shows_who_waits(profile):
    [axes] = profile_plots.timeline(profile).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    drawn = set()
    for bars in axes.collections:
        colour = to_hex(bars.get_facecolor()[0]).upper()
        part = next(part for part, own in PART_COLOURS.items() if own == colour)
        for path in bars.get_paths():
            box = path.get_extents()
            drawn.add((part, round(box.x0, 3), round(box.x1, 3), round(box.y0, 2)))
    # Only the last step, from 0 ms; exchanges and waiting a second time, below the lane.
    assert drawn == {
        ("experts up", 0, 6, -0.3), ("dispatch", 6, 8, -0.3), ("dispatch", 6, 8, 0.2),
        ("experts up", 0, 3, 0.7), ("waiting", 3, 6, 0.7), ("waiting", 3, 6, 1.2), ("dispatch", 6, 8, 0.7), ("dispatch", 6, 8, 1.2),
    }  # fmt: skip


def test_fetches_are_below_the_lane_also_while_others_compute(profile):
    rows = [
        (0, 1, 1, "fetch", "Memcpy", 0.009, 0.002, 0.0, 1e6, 0.0),
        (0, 1, 1, "fetch", "Memcpy", 0.016, 0.001, 0.001, 5e5, 0.0),
    ]
    frame = pd.concat([profile.frame, pd.DataFrame(rows, columns=profile.frame.columns)], ignore_index=True)
    [axes] = profile_plots.timeline(replace(profile, frame=frame)).axes
    drawn = set()
    for bars in axes.collections:
        if to_hex(bars.get_facecolor()[0]).upper() == PART_COLOURS["fetch"]:
            for path in bars.get_paths():
                box = path.get_extents()
                drawn.add((round(box.x0, 3), round(box.x1, 3), round(box.y0, 2)))
    assert drawn == {(8, 9, -0.3), (1, 3, 0.2), (8, 9, 0.2)}
    assert "and experts that are fetched" in axes.get_title(loc="left")


def test_the_other_pictures_show_the_tables(profile):
    [axes] = profile_plots.shares(profile).axes
    assert [text.get_text().strip() for text in axes.texts] == [
        "25.0%, 10% of the limit",
        "56.2%, 33% of the limit",
        "18.8%",
    ]
    left, right = profile_plots.experts(profile).axes
    assert left.collections[0].get_offsets().tolist() == [[30, pytest.approx(6)], [10, pytest.approx(3)]]
    assert [bar.get_height() for bar in right.patches] == pytest.approx([1.5, 6 / 4.5])
    # The busiest rank is the one with most rows, also where another one takes longer.
    swapped = replace(profile, rows=profile.rows.assign(rank=1 - profile.rows["rank"]))
    _, right = profile_plots.experts(swapped).axes
    assert [bar.get_height() for bar in right.patches] == pytest.approx([1.5, 3 / 4.5])
    [axes] = profile_plots.roofline(profile).axes
    [point] = axes.collections[0].get_offsets().tolist()
    assert point == pytest.approx([15, 1.5e6 / 0.0045 / 1e12]) and [t.get_text() for t in axes.texts] == [
        "experts up"
    ]
    more = replace(profile, meta=profile.meta | {"blocks": 4}, plain=2 * profile.plain)
    left, right = profile_plots.by_batch([more, profile]).axes
    measured, limit = (line.get_xydata().tolist() for line in left.lines)
    assert measured == [[2, 7.5], [4, 15]] and [y for _, y in limit] == pytest.approx([1.7, 1.7])
    assert sum(bar.get_height() for bar in right.patches) == pytest.approx(2)


def test_no_key_covers_a_label(profile):
    """The longest bar may be the last one, and so may the busiest placement."""
    rows = [(rank, 1, -1, "host", "", 0.016, 0.05, 0.05, 0.0, 0.0) for rank in (0, 1)]
    frame = pd.concat([profile.frame, pd.DataFrame(rows, columns=profile.frame.columns)], ignore_index=True)
    trace, _ = synthetic(tokens=600, layers=(1,), experts=6, block=50)
    for figure in (
        profile_plots.shares(replace(profile, frame=frame)),
        profile_plots.placements(profiling.placements(trace, profile)),
    ):
        FigureCanvasAgg(figure).draw()
        [axes], [key] = figure.axes, figure.legends
        drawn = [*axes.texts, *axes.patches, axes.title, axes.xaxis.label]
        assert axes.get_legend() is None and len(drawn) > 4
        assert not any(key.get_window_extent().overlaps(one.get_window_extent()) for one in drawn)


def test_what_placements_save(profile):
    trace, _ = synthetic(tokens=600, layers=(1,), experts=6, block=50)
    table = profiling.placements(trace, profile)
    shown = table.drop(columns=["saved", "ranks"])
    assert shown.equals(metrics.placement(trace, 2).drop(columns="saved"))
    saved = profiling.saved(table).set_index("placement")
    own = table.set_index("placement")
    assert saved.loc["fitted", "saved of a step"] == pytest.approx(
        0.75 * (1 - own.loc["fitted", "value"] / own.loc["contiguous", "value"])
    )
    # One rank has nothing to place, and of seven one has no expert: the table and the picture are of four, and say so.
    for ranks in (1, 7):
        other = replace(profile, meta=profile.meta | {"world_size": ranks})
        of_four = profiling.placements(trace, other)
        assert profiling.saved(of_four)["saved of a step"].isna().all()
        assert set(of_four["ranks"]) == {4} and set(table["ranks"]) == {2}
        [axes] = profile_plots.placements(of_four).axes
        assert axes.get_title("left").startswith("Rows of the busiest of 4 ranks")
    [key] = profile_plots.placements(table).legends
    assert [text.get_text() for text in key.get_texts()] == [
        "contiguous",
        "shuffled",
        "fitted",
        "replicated",
    ]


def test_intervals_of_placements_are_those_of_the_table():
    """An interval without its bias may lie beside the value, as the second one does."""
    columns = {
        "layer": [1, 1],
        "ranks": [2, 2],
        "placement": ["contiguous", "fitted"],
        "value": [1.5, 1.2],
        "low": [1.4, 1.0],
        "high": [1.7, 1.1],
    }
    [axes] = profile_plots.placements(pd.DataFrame(columns)).axes
    drawn = [segment[:, 1].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert drawn == [[1.4, 1.7], [1.0, 1.1]]


def test_the_widget_hands_out_the_profile_once_it_is_asked(profile, monkeypatch):
    view = timeline.Timeline(profile)
    sent = []
    monkeypatch.setattr(view, "send", lambda content, buffers: sent.append((content, buffers)))
    view._answer(view, {"ask": "profile"}, [])
    [(content, buffers)] = sent
    header, arrays = pack(profile)
    assert content == {"header": header} and all((a == b).all() for a, b in zip(buffers, arrays, strict=True))
    held = SimpleNamespace(**{name: array for (name, _), array in zip(header["arrays"], arrays, strict=True)})
    assert held.rank.tolist() == [0] * 4 + [1] * 6 and (np.diff(held.start[held.rank == 1]) > 0).all()
    assert [header["parts"][part] for part in held.part[:2]] == ["experts up", "dispatch"]
    assert header["steps"] == [pytest.approx([0, 0.008]), pytest.approx([0.008, 0.016])]
    assert "<iframe" in view.embedded().data and "moekit-timeline" in view.embedded().data
    assert not {"profile", "packed"} & set(view.keys)


def test_a_roof_without_a_point_is_drawn():
    """No part of a profile may have work that is known."""
    profile = made_up()
    assert profile_plots.roofline(replace(profile, frame=profile.frame.assign(flop=0.0)))
