"""Figures on small data: what is on their axes, and how much of it."""

import numpy as np
import pytest

from peft_moe_merge.mtil.report.expert_figures import activation_map, block_label, selection_over_training
from peft_moe_merge.mtil.report.figures import growth, plasticity
from peft_moe_merge.report.statistics import interval

BLOCKS = ["vision_model.encoder.layers.0.mlp", "text_model.encoder.layers.0.mlp", "text_model.encoder.layers.10.mlp"]
MATRIX = [[80.0, 30.0, 20.0], [70.0, 90.0, 26.0], [65.0, 84.0, 95.0]]


def legend(figure_or_axes):
    return [text.get_text() for text in figure_or_axes.get_texts()]


def panels(figure, *titles):
    found = {axes.get_title(): axes for axes in figure.axes}
    return [found[title] for title in titles]


def test_selection_over_training_shows_what_was_selected_since_the_last_snapshot():
    snapshots = {
        "birds": [(5, {block: [4, 0, 0] for block in BLOCKS}), (20, {block: [5, 1, 2] for block in BLOCKS})],
        "cars": [(10, {block: [0, 0, 3] for block in BLOCKS[:2]})],  # the third block is not counted there
    }
    figure = selection_over_training(snapshots)
    text, deep, vision = panels(figure, "text 0", "text 10", "vision 0")
    assert len(figure.axes) == 4, "three blocks and the colour bar" and figure.axes[-1].get_ylabel() == "selected (%)"
    (mesh,) = text.collections
    shares_ET = mesh.get_array().reshape(3, 3)
    np.testing.assert_allclose(shares_ET, [[100, 25, 0], [0, 25, 0], [0, 50, 100]])
    assert np.unique(mesh.get_coordinates()[..., 0]).tolist() == [0, 5, 20, 30], "columns are as wide as their steps"
    assert np.ma.getmaskarray(deep.collections[0].get_array()).reshape(3, 3).all(axis=0).tolist() == [
        False,
        False,
        True,
    ]
    assert [note.get_text() for note in vision.texts] == ["birds", "cars"] and vision.get_xlim() == (0, 30)
    assert text.get_ylabel() == "expert" and vision.get_xlabel() == "optimizer step"
    with pytest.raises(ValueError, match="task 'birds' are to rise from above step 0; their steps are \\[3, 2\\]"):
        selection_over_training({"birds": [(3, {}), (2, {})]})
    with pytest.raises(ValueError, match="no snapshot"):
        selection_over_training({"birds": []})


def test_selection_in_a_pool_that_grows():
    layers = ["vision_model.encoder.layers.3.mlp.fc1", "vision_model.encoder.layers.3.self_attn.q_proj"]
    assert list(map(block_label, [*layers, BLOCKS[0], "other"])) == [
        "vision 3 fc1",
        "vision 3 q_proj",
        "vision 0",
        "other",
    ]
    snapshots = {"birds": [(2, {layers[0]: [2, 2]})], "cars": [(2, {layers[0]: [0, 0, 1, 3]})]}
    (mesh,) = selection_over_training(snapshots).axes[0].collections
    shares_ET = np.ma.filled(mesh.get_array().reshape(4, 2), np.nan)
    np.testing.assert_allclose(shares_ET, [[50, 0], [50, 0], [np.nan, 25], [np.nan, 75]])


def test_plasticity_is_the_diagonal_with_its_interval():
    higher = (np.array(MATRIX) + 3).tolist()
    figure = plasticity({"ours": [MATRIX, higher], "theirs": [MATRIX]}, ["birds", "cars", "digits"])
    (axes,) = figure.axes
    ours, theirs = axes.get_lines()
    assert ours.get_xdata().tolist() == [1, 2, 3] and ours.get_ydata().tolist() == [81.5, 91.5, 96.5]
    assert theirs.get_ydata().tolist() == [80, 90, 95] and ours.get_color() != theirs.get_color()
    (band,) = axes.collections  # one seed has none
    _, half = interval([[80.0], [83.0]])
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(81.5 - half[0])
    assert legend(axes.get_legend()) == ["ours", "theirs"] and axes.get_ylabel() == "just learnt (%)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["birds", "cars", "digits"]


def test_plasticity_relative_to_the_model_before():
    figure = plasticity({"ours": [MATRIX]}, relative=True)
    (axes,) = figure.axes
    gained = axes.get_lines()[0].get_ydata()
    assert np.isnan(gained[0]) and gained[1:].tolist() == [60, 75]
    assert axes.get_legend() is None and axes.get_ylabel() == "gained when learnt (points)"


def test_growth_has_a_panel_per_measure():
    figure = growth(
        {
            "ours": {"memory": [[2e6, 4e6], [3e6, 5e6]], "step_seconds": [[0.1, 0.2]]},
            "theirs": {"memory": [[1e6, 1e6]]},
        }
    )
    memory, time = figure.axes
    assert (memory.get_ylabel(), time.get_ylabel()) == ("memory (MB)", "time of a step (ms)")
    assert [line.get_ydata().tolist() for line in memory.get_lines()] == [[2.5, 4.5], [1, 1]]
    assert time.get_lines()[0].get_ydata() == pytest.approx([100, 200]) and len(memory.collections) == 1
    assert memory.get_xlabel() == "tasks learnt" and legend(figure.legends[0]) == ["ours", "theirs"]
    with pytest.raises(ValueError, match="give memory, parameters, step_seconds"):
        growth({"ours": {}})


def test_activation_map_embeds_both_stages_together():
    generator = np.random.default_rng(0)
    experts = np.repeat([0, 2, 9], 8)
    before = generator.normal(size=(24, 6)) + 20 * np.eye(3)[experts % 5 % 3].repeat(2, axis=1)
    figure = activation_map({"before": (before, experts), "after": (before[:16] + 0.01, experts[:16])}, seed=3)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("before", "after") and first.get_xlabel() == "t-SNE 1"
    assert [len(drawn.get_offsets()) for drawn in first.collections] == [8, 8, 8] and len(second.collections) == 2
    assert legend(figure.legends[0]) == ["0", "2", "9"] and figure.legends[0].get_title().get_text() == "expert"
    assert len({tuple(drawn.get_facecolor()[0]) for drawn in first.collections}) == 3
    for early, late in zip(first.collections, second.collections, strict=False):
        assert (early.get_facecolor() == late.get_facecolor()).all(), "an expert keeps its colour"
        shift = np.linalg.norm(early.get_offsets() - late.get_offsets(), axis=1)
        assert shift.max() < np.ptp(early.get_offsets(), axis=0).max() + np.ptp(late.get_offsets(), axis=0).max()
    again = activation_map({"before": (before, experts), "after": (before[:16] + 0.01, experts[:16])}, seed=3)
    np.testing.assert_array_equal(again.axes[0].collections[1].get_offsets(), first.collections[1].get_offsets())


def test_activation_map_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"'before' needs .* the shapes \(4, 2\) and \(3,\)"):
        activation_map({"before": (np.zeros((4, 2)), [0, 1, 1])})
    with pytest.raises(ValueError, match="at least 8 activations; got 4"):
        activation_map({"before": (np.zeros((4, 2)), [0, 1, 1, 0])})
