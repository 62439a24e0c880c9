"""The report: only runs that succeeded are results, each can be repeated by its command, and the committed pages are current."""
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from ncp_vae.engine import cli, paper, report
from ncp_vae.engine.parameters import find_experiment, home, notebooks, params_for
from ncp_vae.measured import Measured

ROOT = Path(__file__).parents[1]
GAIN = {"nll_base": dict(value=229.2, std_error=0.76, kind="upper bound", n=10000),
        "nll_ncp": dict(value=228.96, std_error=0.75, n=10000),
        "nll_gain": dict(value=0.2351, std_error=0.0051, n=10000)}


@pytest.fixture(autouse=True)
def this_clone(monkeypatch):
    monkeypatch.setenv("NCP_VAE_HOME", str(ROOT))


def write(folder, experiment="hierarchical", preset="cpu", given=None, metrics=GAIN, state="succeeded", about={}, **status):
    "A run as the command leaves it, on another machine and with a clean commit unless said otherwise."
    folder.mkdir(parents=True)
    asked = dict(experiment=experiment, preset=preset, params=params_for(find_experiment(experiment), preset, given))
    machine = dict(commit="1234567" + "0" * 33, cpu="a processor", cpus=8, gpus=["NVIDIA H100, 81559 MiB, 1.0"], threads=1)
    for name, content in dict(
            params=asked, environment=machine,
            metrics={"data": asked["params"].get("dataset", experiment), "model": asked["params"].get("model", ""), "parts": [],
                     **about, **asked, "commit": machine["commit"], "environment": machine, "seconds": 125.0, "metrics": metrics},
            status={**dict(state=state, attempt=1, pid=1, host="elsewhere", created=0.0, started=0.0, ended=86400.0), **status}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def page(folder):
    "The results page of a folder of runs: what is shown as results, and the rest."
    results, _, rest = report.results_page(folder).partition("## The rest")
    return results, rest


# ---- which runs are results -----------------------------------------------------------------------------------------

def test_a_run_that_succeeded_elsewhere_is_a_result_with_its_circumstances(tmp_path):
    write(tmp_path / "mine")
    results, rest = page(tmp_path)
    for words in ("228.96 ± 0.75", "0.2351 ± 0.0051", "46.1", "NVIDIA H100, a processor, 8 cores", "2 min", "1970-01-02", "commit 1234567;",
                  "Fashion-MNIST", "seed 0", "vae_steps 40,000", "ncp-vae run hierarchical --preset cpu\n"):
        assert words.rstrip(";") in results, words
    assert "`mine`" not in rest


@pytest.mark.parametrize("state, said", [("failed", "failed"), ("interrupted", "interrupted"), ("running", "running")])
def test_a_run_that_did_not_succeed_is_named_without_its_numbers(tmp_path, state, said):
    "Its metrics.json is whole: it failed after its last cell, or is being run elsewhere."
    write(tmp_path / "broken", state=state)
    results, rest = page(tmp_path)
    assert "228.96" not in results + rest and "`broken`" not in results and f"| `broken` | {said} |" in rest


def test_a_killed_run_is_no_result(tmp_path):
    "Its file says that it runs on this machine, in a process that does not exist."
    import platform
    write(tmp_path / "gone", state="running", host=platform.node(), pid=os.getpid(), created=0.0)
    results, rest = page(tmp_path)
    assert "228.96" not in results + rest and "| `gone` | killed |" in rest


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "metrics.json").write_text((folder / "metrics.json").read_text()[:-9]),
    lambda folder: (folder / "metrics.json").unlink(),
    lambda folder: (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace("228.96", "NaN")),
    lambda folder: (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace("40000", "41000")),
    lambda folder: (folder / "params.json").unlink(),
], ids=["torn", "missing", "not a number", "of other parameters", "nobody knows of what"])
def test_a_damaged_record_is_no_result(tmp_path, damage):
    damage(write(tmp_path / "damaged"))
    results, rest = page(tmp_path)
    assert "±" not in results.partition("## Does")[2].partition("## Table 1")[0] and "| `damaged` | without a sound record |" in rest
    assert str(tmp_path) not in results + rest


def test_a_run_without_status_is_no_result(tmp_path):
    (write(tmp_path / "silent") / "status.json").unlink()
    assert "| `silent` | killed |" in page(tmp_path)[1]


def test_without_the_folder_there_is_no_page(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        report.results_page(tmp_path / "nowhere")


def test_an_empty_folder_gives_a_page_without_results(tmp_path):
    results, rest = page(tmp_path)
    assert "No run has recorded a comparison." in results and "Without a result" not in rest
    assert results.count("Not run here") == len(paper.ITEMS)


# ---- a result can be repeated ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("experiment, preset, given", [
    ("hierarchical", "smoke", {}),
    ("hierarchical", "cpu", {"dataset": "mnist5k", "vae_lr": "3e-4", "seed": "7"}),
    ("hierarchical", "full", {"compile": "false", "bf16": "False", "model": "nvae:mnist"}),
    ("digits", "full", {"data_root": "a folder's name", "vae_steps": "1e5"}),
    ("gaussians25", "cpu", {"lr": 1e-5}),
])
def test_the_command_of_a_record_repeats_it(tmp_path, experiment, preset, given):
    write(tmp_path / "run", experiment, preset, given)
    ((run,), _) = report.read_results(tmp_path)
    words = cli._parser().parse_args(shlex.split(report._command_of(run))[1:])
    assert words.name == experiment
    assert params_for(find_experiment(experiment), words.preset or "smoke", cli._assignments(words.param)) == run.params


def test_the_command_names_only_what_differs(tmp_path):
    write(tmp_path / "run", given={"seed": 3, "groups": 2})
    ((run,), _) = report.read_results(tmp_path)
    assert report._command_of(run) == "ncp-vae run hierarchical --preset cpu -p seed=3 -p groups=2"


def test_a_run_by_hand_gets_the_nearest_command(tmp_path):
    folder = write(tmp_path / "hand", preset="smoke", given={"seed": 3})
    for name in ("params.json", "metrics.json"):
        (folder / name).write_text((folder / name).read_text().replace('"smoke"', '"by hand"'))
    results, _ = page(tmp_path)
    assert "the nearest command" in results and "ncp-vae run hierarchical -p seed=3\n" in results


def test_a_record_of_a_notebook_that_is_gone_is_refused():
    with pytest.raises(ValueError, match="no experiment is called 'gone'"):
        report._command_of(SimpleNamespace(experiment="gone", preset="cpu", params={}))


def test_the_papers_commands_can_be_typed():
    for item in paper.ITEMS.values():
        for asked in item.experiments:
            words = cli._parser().parse_args(shlex.split(report._typed(**asked))[1:])
            assert words.name in notebooks() and (words.out or "") == asked.get("out", "")
            typed = params_for(find_experiment(words.name), words.preset or "smoke", cli._assignments(words.param))
            assert typed == params_for(find_experiment(asked["experiment"]), asked["preset"], asked["params"])


def test_the_papers_own_experiment_is_recognised(tmp_path):
    write(tmp_path / "toy", "gaussians25", "cpu", {"seed": 5}, {"ll_base": dict(value=-2.9, std_error=0.1)})
    write(tmp_path / "short", "gaussians25", "smoke", {}, {"ll_base": dict(value=-2.9, std_error=0.1)})
    text = report.section("Figure 11", report.read_results(tmp_path)[0])
    assert "The paper's experiment is `toy`." in text and "Not run here" not in text


# ---- what is beside what --------------------------------------------------------------------------------------------

def test_a_number_stands_in_its_row_and_under_its_data(tmp_path):
    write(tmp_path / "f", "digits", "full", {}, {"nll_base": dict(value=231.5), "nll_ncp_bound": dict(value=229.5)})
    write(tmp_path / "m", "digits", "full", {"dataset": "mnist"}, {"nll_base": dict(value=85.5), "nll_ncp_bound": dict(value=83.5)})
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in report.section("Table 8", report.read_results(tmp_path)[0]).splitlines()
             if line.startswith("|")}
    assert lines["| "] == ["paper, MNIST", "`f`, Fashion-MNIST", "`m`, MNIST", "what it is |"]
    assert lines["| VAE with Gaussian prior"][:3] == ["84.82", "", "85.5"]
    assert lines["| Gaussian prior, Fashion-MNIST"][1:3] == ["231.5", ""] and "not checked" in lines["| Gaussian prior, Fashion-MNIST"][0]
    assert lines["| NCP-VAE"][:3] == ["82.82", "229.5", "83.5"]
    assert lines["| VAE with LARS prior"] == ["83.03", "", "", "not part of this project |"]


def test_runs_that_another_lays_side_by_side_are_shown_by_it(tmp_path):
    for groups in (1, 2):
        write(tmp_path / f"hierarchical_k{groups}", given={"groups": groups})
    write(tmp_path / "groups", "groups", "smoke", {}, {"nll_gain_k1": dict(value=0.8, std_error=0.1)},
          about=dict(data="fashion_mnist", parts=["hierarchical_k1", "hierarchical_k2"]))
    runs = report.read_results(tmp_path)[0]
    assert "hierarchical_k1" not in report.section("Table 4", runs)
    text = report.section("Table 5", runs)
    assert "`groups`, Fashion-MNIST" in text and "-p groups=1" in text and "-p groups=2" in text
    assert "nll_gain_k1" not in report.beats(runs) and report.beats(runs).count("`hierarchical_k1`") == 1


def test_a_record_says_what_it_is_about_whatever_its_parameters_are_called(tmp_path):
    "A run that takes up others says their data and names to finish; here its parameters say other ones."
    write(tmp_path / "part", given={"dataset": "mnist"})
    folder = write(tmp_path / "groups", "groups", "smoke", {"pattern": "nobody"}, {"nll_gain_k1": dict(value=0.8, std_error=0.1)})
    record = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**record, "data": "omniglot", "model": "dense", "parts": ["part"]}))
    text = report.section("Table 5", report.read_results(tmp_path)[0])
    assert "`groups`, Omniglot" in text and "**`part`** on MNIST" in text


def test_a_run_outside_the_tables_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "ITEMS", {name: item for name, item in paper.ITEMS.items() if name != "Figure 11"})
    write(tmp_path / "toy", "gaussians25", "cpu")
    assert "**`toy`**" in page(tmp_path)[1]


def test_a_unit_that_is_not_the_papers_is_said():
    row = paper.row("NCP-VAE", "5.25", metric="frechet_ncp")
    assert report._about(row, [Measured(0.1, unit="feature distance")]) == "FID in the paper, here feature distance, estimate"
    assert report._about(row, [Measured(6.0, unit="FID")]) == "FID, estimate"


@pytest.mark.parametrize("base, ncp, answer", [((10.0, 0.3), (8.0, 0.4), "yes"), ((10.0, 0.3), (9.5, 0.4), "**no: within its error**"),
                                               ((10.0, 0.3), (12.0, 0.4), "**no: worse**"), ((10.0, None), (8.0, 0.4), "its error is not known")])
def test_the_answer_to_whether_the_prior_beats_its_base(base, ncp, answer):
    ((_, gain, share),) = report._gains({"frechet_base": Measured(base[0], base[1]), "frechet_ncp": Measured(ncp[0], ncp[1])})
    assert report._verdict(gain)[1] == answer
    assert gain.value == base[0] - ncp[0] and share == (base[0] - ncp[0]) / base[0]
    assert gain.std_error is None or gain.std_error == pytest.approx(0.5)


# ---- the paper's numbers --------------------------------------------------------------------------------------------

def test_every_table_and_figure_is_there_once():
    numbers = [int(name.split()[1]) for name in paper.ITEMS]
    assert numbers[:9] == list(range(1, 10)) and sorted(numbers[9:] + [1, 2, 5]) == list(range(1, 13))
    for item in paper.ITEMS.values():
        models = [row.model for row in item.rows]
        assert len(models) == len(set(models))
        for row in item.rows:
            assert not row.printed or paper.value(item.name, row.model) == float(row.printed)


@pytest.mark.parametrize("call, words", [
    (lambda: paper.value("Table 4", "NCP"), "no row of Table 4 is called 'NCP'; did you mean"),
    (lambda: paper.value("Table 40", "NCP-VAE"), "did you mean 'Table 4'"),
    (lambda: paper.value("Table 4", "what there was to gain"), "no row of Table 4"),
    (lambda: paper.item("Figure 5"), "Figure 5 is no experiment"),
    (lambda: report.section("Tabel 4", []), "no table or figure of the paper is called 'Tabel 4'"),
    (lambda: report.pictures("Figure 2", []), "Figure 2 is no experiment"),
])
def test_an_unknown_item_is_refused(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_value_gives_what_is_printed():
    assert paper.value("Table 4", "NCP-VAE") == 78.10 and paper.value("Figure 11", "NCP-VAE") == -0.954


# ---- the committed pages --------------------------------------------------------------------------------------------

def test_the_page_depends_on_the_records_only(tmp_path, monkeypatch):
    write(tmp_path / "a" / "mine")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = report.results_page(tmp_path / "a")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setenv("TZ", "Pacific/Apia")
    time.tzset()
    try:
        assert report.results_page(tmp_path / "b") == before
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_results_page_is_current():
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == report.results_page(home() / "results"), "run `ncp-vae report`"


def test_the_results_notebook_is_current():
    cells = nbformat.read(ROOT / "nbs" / "results.ipynb", as_version=4).cells
    shown = [out["data"]["text/markdown"] for cell in cells if cell.cell_type == "code" for out in cell.outputs
             if "text/markdown" in out.get("data", {})]
    runs, others = report.read_results(home() / "results")
    wanted = [report.overview(runs), report.beats(runs), *(report.section(name, runs) for name in paper.ITEMS), report.remainder(runs, others)]
    missing = [text[:60] for text in wanted if text not in shown]
    assert not missing, "run `ncp-vae report`"
    titles = [title for name in paper.ITEMS for title, _ in report.pictures(name, runs)]
    assert sorted(f"*{title}*" for title in titles) == sorted(text for text in shown if re.fullmatch(r"\*[^*]+\*", text))
