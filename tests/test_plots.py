"""Figures of a training: lines where they mean something, and points that can be told apart."""
import json
from math import log

import matplotlib.pyplot as plt
import pytest

from ncp_vae.engine.plots import group_panels, history_panels


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def history(folder, groups, stages=("ncp",)):
    "Two rows of each stage, as training writes them: with one group the sum alone, with more each group's loss beside it."
    rows = [dict(stage="vae", step=10, loss=100.0)]
    for stage in stages:
        each = {f"loss_{k}": 1.3 for k in range(groups)}
        held_out = {**each, **{f"loss_std_error_{k}": 0.1 for k in range(groups)}, "loss": 1.3 * groups}
        rows += [dict(stage=stage, step=step, loss=1.3 * groups, **(each if groups > 1 else {})) for step in (10, 20)]
        rows += [dict(stage=f"{stage} held-out", step=step, **held_out) for step in (10, 20)]
    path = folder / "history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stages", [("ncp",), ("ncp", "ncp-2")])
def test_the_dotted_line_is_the_loss_of_as_many_classifiers_that_know_nothing(tmp_path, groups, stages):
    vae, *panels = history_panels(history(tmp_path, groups, stages)).axes
    assert not [line for line in vae.lines if line.get_linestyle() == ":" and line.get_marker() == "None"]
    assert len(panels) == len(stages)
    for panel in panels:
        (dotted,) = [line for line in panel.lines if line.get_linestyle() == ":" and line.get_marker() == "None"]
        assert list(dotted.get_ydata()) == pytest.approx([groups * 2 * log(2)] * 2)
        assert panel.get_ylabel() == ("loss, sum of 4 groups [nats]" if groups > 1 else "loss [nats]")


def test_groups_are_named_by_a_legend_and_small_effective_sizes_can_be_read(tmp_path):
    fig = group_panels(history(tmp_path, 3), [2.0, 20.0, 400.0], proposals=500)
    left, right = fig.axes
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["group 1", "group 2", "group 3"]
    assert not left.texts and not right.texts and right.get_yscale() == "log"
