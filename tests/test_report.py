"""The report: only runs that succeeded are results, each can be repeated by its command, and the committed pages are current."""
import json
import os
import platform
import re
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from ncp_vae.engine import cli, experiment, paper, report
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
    "The results page of a folder of runs: what is shown as results, and the runs' circumstances with what is no result."
    results, _, runs = report.results_page(folder).replace("\u00a0", " ").partition("## The runs")
    return results, runs


def rows(folder):
    "The rows of a folder's runs."
    return report._rows(report.read_results(folder)[0])


# ---- which runs are results -----------------------------------------------------------------------------------------

def test_a_run_that_succeeded_elsewhere_is_a_result_with_its_circumstances(tmp_path):
    write(tmp_path / "mine")
    results, runs = page(tmp_path)
    for words in ("228.96 ± 0.75", "0.2351 ± 0.0051", "**yes**", "Fashion-MNIST (`mine`)", "one seed"):
        assert words in results, words
    for words in ("**`mine`**", "NVIDIA H100; a processor, 8 cores", "in 0:02:05", "1970-01-02", "trained and scored at commit 1234567 ",
                  "Fashion-MNIST", "seed 0", "40,000 steps", "ncp-vae run hierarchical --preset cpu\n"):
        assert words in runs, words
    assert "Without a result" not in runs


@pytest.mark.parametrize("state, said", [("failed", "failed"), ("interrupted", "interrupted"), ("running", "running")])
def test_a_run_that_did_not_succeed_is_named_without_its_numbers(tmp_path, state, said):
    "Its metrics.json is whole: it failed after its last cell, or is being run elsewhere."
    write(tmp_path / "broken", state=state)
    results, runs = page(tmp_path)
    assert "228.96" not in results + runs and "`broken`" not in results and f"| `broken` | {said} |" in runs


def test_a_killed_run_is_no_result(tmp_path):
    "Its file says that it runs on this machine, in a process that does not exist."
    write(tmp_path / "gone", state="running", host=platform.node(), pid=os.getpid(), created=0.0)
    results, runs = page(tmp_path)
    assert "228.96" not in results + runs and "| `gone` | killed |" in runs


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "metrics.json").write_text((folder / "metrics.json").read_text()[:-9]),
    lambda folder: (folder / "metrics.json").unlink(),
    lambda folder: (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace("228.96", "NaN")),
    lambda folder: (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace("40000", "41000")),
    lambda folder: (folder / "params.json").unlink(),
], ids=["torn", "missing", "not a number", "of other parameters", "nobody knows of what"])
def test_a_damaged_record_is_no_result(tmp_path, damage):
    damage(write(tmp_path / "damaged"))
    results, runs = page(tmp_path)
    assert "`damaged`" not in results and "0.2351" not in results and "| `damaged` | without a sound record |" in runs
    assert str(tmp_path) not in results + runs


DAMAGES = [
    ("status", {"state": 5}), ("status", {"state": ["succeeded"]}), ("status", {"state": "succeeded"}), ("status", [1]),
    ("status", dict(state="succeeded", attempt=1, ended="today")), ("status", dict(state="succeeded", attempt=1, ended=1e30)),
    ("status", dict(state="succeeded", attempt="first", ended=0.0)), ("status", dict(state="running", host=platform.node(), pid="x", created=0)),
    ("status", dict(state="running", host=platform.node(), pid=1, created="x")), ("status", dict(state="running")),
    ("metrics", dict(params=5)), ("metrics", dict(data=[1])), ("metrics", dict(parts=5)), ("metrics", dict(parts=[1])),
    ("metrics", dict(commit=5)), ("metrics", dict(environment=None)), ("metrics", dict(seconds="x")), ("metrics", dict(experiment=5)),
    ("metrics", dict(preset=None)), ("metrics", dict(earlier_commits=[1])), ("metrics", dict(params={"a": 1})), ("metrics", dict(experiment="gone")),
    ("metrics", dict(metrics={"a": dict(value=1.0, unit=5)}))]


def test_damaged_records_hide_no_other(tmp_path):
    "Most of these ended the report of all runs with a traceback. What is in params.json too is damaged there as well."
    write(tmp_path / "sound")
    for k, (file, content) in enumerate(DAMAGES):
        bad = write(tmp_path / f"bad{k}")
        if file == "status":
            (bad / "status.json").write_text(json.dumps(content))
            continue
        for name in ("metrics", "params"):
            old = json.loads((bad / f"{name}.json").read_text())
            changed = {key: value for key, value in content.items() if name == "metrics" or key in old}
            (bad / f"{name}.json").write_text(json.dumps({**old, **changed}))
    results, runs = page(tmp_path)
    assert "228.96" in results and "`sound`" in results and "`bad" not in results
    for k in range(len(DAMAGES)):
        assert re.search(rf"\| `bad{k}` \| (killed|running|without a sound record) \|", runs), DAMAGES[k]
    assert [run.name for run in report.read_results(tmp_path)[0]] == ["bad20", "bad21", "sound"]      # only their notebooks can tell


def test_a_number_that_was_changed_by_hand_is_noticed(tmp_path):
    "Also to one that looks like any other. Records of a time before their sum was written down stay as they are."
    folder = write(tmp_path / "mine", state="running")
    experiment.end(folder, "succeeded")
    assert "228.96" in page(tmp_path)[0]
    whole = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(whole.replace("228.96", "228.69"))
    with pytest.raises(ValueError, match="mine is not its record: it was changed after the run had ended"):
        experiment.read_record(folder)
    results, runs = page(tmp_path)
    assert "228.69" not in results and "| `mine` | without a sound record |" in runs
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({key: value for key, value in status.items() if key != "record"}))
    assert "228.69" in page(tmp_path)[0]


def test_a_run_without_status_is_no_result(tmp_path):
    (write(tmp_path / "silent") / "status.json").unlink()
    assert "| `silent` | killed |" in page(tmp_path)[1]


def test_without_the_folder_there_is_no_page(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        report.results_page(tmp_path / "nowhere")


def test_an_empty_folder_gives_a_page_without_results(tmp_path):
    results, runs = page(tmp_path)
    assert "Nothing was reproduced" in results and "Without a result" not in runs
    not_run = results.partition("## Not run")[2].partition("## Pictures")[0]
    assert not_run.count("`ncp-vae run ") == len(paper.EXPERIMENTS)
    listed = {name for row in table(not_run) for name in names_in(row["for"])}
    assert listed == set(paper.ITEMS)


def names_in(text):
    "'Table 1 to 3, 5; RealNVP Figure B.2' -> Table 1, Table 2, Table 3, Table 5, RealNVP Figure B.2; also of EBM."
    for part in text.split("; "):
        kind = re.match(r"(RealNVP |EBM )?(Table|Figure) ", part).group()
        for numbers in part.removeprefix(kind).split(", "):
            first, _, last = numbers.partition(" to ")
            head = first[:len(first) - len(first.removeprefix("B."))]
            for k in range(int(first.removeprefix("B.")), int((last or first).removeprefix("B.")) + 1):
                yield f"{kind}{head}{k}"


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
    _, runs = page(tmp_path)
    assert "the nearest command" in runs and "ncp-vae run hierarchical -p seed=3\n" in runs


def test_a_record_of_a_notebook_that_is_gone_is_refused():
    with pytest.raises(ValueError, match="no experiment is called 'gone'"):
        report._command_of(SimpleNamespace(experiment="gone", preset="cpu", params={}))


def test_the_papers_commands_can_be_typed(tmp_path):
    tmp_path.joinpath("none").mkdir()
    table = report.sections(*report.read_results(tmp_path / "none"))["Not run"]
    typed = re.findall(r"`(ncp-vae run [^`]+)`", table)
    for asked, command in zip(paper.EXPERIMENTS.values(), typed, strict=True):
        words = cli._parser().parse_args(shlex.split(command)[1:])
        assert (words.out or "") == asked.get("out", "") and words.name in notebooks()
        given = params_for(find_experiment(words.name), words.preset or "smoke", cli._assignments(words.param))
        assert given == params_for(find_experiment(asked["experiment"]), asked["preset"], paper.each(asked)[0]["params"])


def test_the_papers_own_experiment_is_recognised_and_never_in_one_table_with_a_stand_in(tmp_path):
    gain = {"ll_base": dict(value=-2.9, std_error=0.1), "ll_ncp": dict(value=-0.5, std_error=0.1), "ll_gain": dict(value=2.4, std_error=0.1)}
    write(tmp_path / "toy", "gaussians25", "cpu", {"seed": 5}, gain)
    write(tmp_path / "short", "gaussians25", "smoke", {}, gain)
    parts = report.sections(*report.read_results(tmp_path))
    assert "`toy`" in parts["The papers' own experiments"] and "`short`" not in parts["The papers' own experiments"]
    assert "`short`" in parts["Stand-ins"] and "`toy`" not in parts["Stand-ins"]
    assert "gaussians25" not in parts["Not run"]
    first, second, *_ = parts["Verdict"].splitlines()
    assert first.startswith("- **Reproduced.** Figure 11") and "in the paper -2.753 → -0.954" in first
    assert second.startswith("- **Never run") and "Figure 11" not in second and "Table 1 to 9; Figure 3, 4, 6 to 10, 12; RealNVP" in second
    (row,) = table(parts["Verdict"])
    assert list(row.values())[1:] == ["Figure 11", "**1 of 1**", "2.40 ± 0.10 nats, `short`", ""]


def test_the_papers_own_experiment_that_fails_is_not_reproduced(tmp_path):
    write(tmp_path / "toy", "gaussians25", "cpu", {}, {"ll_gain": dict(value=-2.4, std_error=0.1)})
    text = report.sections(*report.read_results(tmp_path))["Verdict"]
    assert text.startswith("- **Not reproduced.** Figure 11") and re.search(r"- \*\*Not seen:\*\* .* \(`toy`\) \(\*\*worse\*\*\)\.", text)


# ---- what is beside what --------------------------------------------------------------------------------------------

def table(text):
    "The rows of the first Markdown table of a text, as dictionaries."
    lines = [[cell.strip() for cell in line.replace("\u00a0", " ").strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_a_row_has_our_models_name_its_data_and_both_numbers(tmp_path):
    found = {"nll_base": dict(value=231.5, std_error=0.7), "nll_ncp_bound": dict(value=229.5, std_error=0.7), "nll_gain_bound": dict(value=2.0, std_error=0.1)}
    write(tmp_path / "f", "digits", "full", {}, found)
    write(tmp_path / "m", "digits", "full", {"dataset": "mnist"}, found)
    text = report.sections(*report.read_results(tmp_path))["Stand-ins"]
    first, second = table(text[text.index("**Table 8"):])
    assert [first["data"], second["data"]] == ["Fashion-MNIST (`f`)", "MNIST (`m`)"]
    assert first["our model"] == "dense VAE of one group, 50 latents, 50,000 steps" and "NCP-VAE" not in str(first)
    assert first["base → ours"] == "231.50 ± 0.70 → 229.50 ± 0.70" and first["gain"] == "2.00 ± 0.10 nats"


@pytest.mark.parametrize("gain, recorded", [("gain_ncp", True), ("", False)])
def test_a_difference_is_taken_only_where_no_record_pairs_it(tmp_path, gain, recorded):
    "Two distances of 102 and 67 with errors of 23 and 18: paired 35 +- 10, taken apart 35 +- 29."
    found = {"frechet_base": dict(value=102.0, std_error=23.0), "frechet_ncp": dict(value=67.0, std_error=18.0)}
    if recorded:
        found[gain] = dict(value=35.0, std_error=10.0)
    write(tmp_path / "r", "rae", "cpu", {}, found)
    (row,) = [row for row in rows(tmp_path) if row.claim.gain == "gain_ncp"]
    assert row.gain.value == 35 and row.gain.std_error == pytest.approx(10 if recorded else 29.2, abs=0.1)
    assert row.answer == ("yes" if recorded else "no: within its error")
    assert ("35 ± 29" in page(tmp_path)[0]) != recorded and ("35 ± 10" in page(tmp_path)[0]) == recorded


def test_runs_that_differ_by_their_seed_are_one_row_with_their_spread(tmp_path):
    for seed, gain in enumerate((1.0, 3.0)):
        found = {**GAIN, "nll_gain": dict(value=gain, std_error=0.1, n=100)}
        write(tmp_path / f"s{seed}", given={"seed": seed}, metrics=found)
    write(tmp_path / "other", given={"groups": 2})
    both, other = sorted(rows(tmp_path), key=lambda row: -len(row.family))
    assert [run.name for run in both.family] == ["s0", "s1"] and both.seeds == "± 1.4 over 2 seeds"
    assert both.gain.value == 2 and both.gain.std_error == pytest.approx(0.1) and both.answer == "no: within its error"
    assert other.seeds == "one seed"


def test_what_got_worse_stands_in_the_row_and_in_the_verdict(tmp_path):
    found = {**GAIN, "frechet_base": dict(value=2.0, std_error=0.1, n=500), "frechet_budgets": dict(value=2.5, std_error=0.1, n=500),
             "mmd2_base": dict(value=0.2, std_error=0.1), "mmd2_budgets": dict(value=0.25, std_error=0.1)}
    write(tmp_path / "mine", metrics=found)
    parts = report.sections(*report.read_results(tmp_path))
    (row,) = table(parts["Stand-ins"])
    assert row["distance, lower is better"] == "2.00 ± 0.10 → 2.50 ± 0.10 (n = 500) (**worse**)"
    assert row["MMD² of latents, lower is better"] == "0.20 ± 0.10 → 0.25 ± 0.10 (≈)"
    (line,) = [line for line in parts["Verdict"].splitlines() if "got worse" in line]
    assert "distance 2.00 ± 0.10 → 2.50 ± 0.10 (Table 4, `mine`)" in line and "MMD" not in line


def test_a_gain_below_zero_is_worse_though_nothing_stands_beside_it(tmp_path):
    found = {"gain_ebm_longer": dict(value=40.0, std_error=5.0), "nll_gain_ebm_longer": dict(value=-4.2, std_error=1.0, unit="nats")}
    write(tmp_path / "mine", "joint_ebm", "cpu", {}, found)
    parts = report.sections(*report.read_results(tmp_path))
    (line,) = [line for line in parts["Verdict"].splitlines() if "got worse" in line]
    assert "likelihood gain of the EBM -4.2 ± 1.0 (EBM Table 3, `mine`)" in line
    assert "-4.2 ± 1.0 (**worse**)" in parts["Stand-ins"].replace("\u00a0", " ")
    write(tmp_path / "seed1", "joint_ebm", "cpu", {"seed": 1}, {**found, "nll_gain_ebm_longer": dict(value=0.0, std_error=1.0, unit="nats")})
    assert "got worse" not in report.sections(*report.read_results(tmp_path))["Verdict"]              # -2.1, with a spread of 3.0 over seeds


def test_a_claim_has_its_least_and_its_most_sure_row_and_its_seeds(tmp_path):
    "By errors, and not by the gain: 30 +- 10 is less sure than 20 +- 1; a spread of seeds is an error too; and what is not seen is named."
    for name, (seed, value, error) in dict(few=(0, 30.0, 10.0), sure=(0, 20.0, 1.0), a=(0, 0.0, 1.0), b=(1, 10.0, 1.0)).items():
        params = dict(seed=seed, latent_dim={"few": 4, "sure": 8}.get(name, 16))
        write(tmp_path / name, "rae", "cpu", params, {"gain_ncp": dict(value=value, std_error=error, unit="raw feature distance")})
    parts = report.sections(*report.read_results(tmp_path))
    (row,) = table(parts["Verdict"])
    assert list(row.values())[2:] == ["**2 of 3**", "5.0 ± 1.0 raw feature distance, seeds ± 7.1 (≈), `a` (2 seeds)", "20.0 ± 1.0 raw feature distance, `sure`"]
    assert "- **Not seen:** the NCP improves a VAE with a Gaussian prior (`a` (2 seeds))." in parts["Verdict"].splitlines()


def test_a_fraction_without_an_error_gets_that_of_as_many_draws(tmp_path):
    found = {"gain_ncp": dict(value=1.0, std_error=0.1), "recall_base": dict(value=0.748, n=5000, unit="fraction"),
             "recall_ncp": dict(value=0.591, n=5000, unit="fraction"), "precision_base": dict(value=0.80, n=50, unit="fraction"),
             "precision_ncp": dict(value=0.78, n=50, unit="fraction")}
    write(tmp_path / "r", "rae", "cpu", {}, found)
    more = rows(tmp_path)[0].more
    assert more["recall, higher is better"][1] == "no: worse" and more["precision, higher is better"][1] == "no: within its error"


def test_k_hat_and_loose_mean_ratios_are_flagged(tmp_path):
    numbers = {**GAIN, "log_z": dict(value=0.1, std_error=0.05, n=1000), "log_z_k_hat": dict(value=0.68, n=1000, unit="k-hat"),
               "log_mean_ratio_1": dict(value=0.0, std_error=0.2)}
    write(tmp_path / "mine", metrics=numbers)
    write(tmp_path / "more", given={"groups": 2}, metrics={**numbers, "log_z_k_hat": dict(value=0.68, n=200_000, unit="k-hat")})
    mine, more = report.read_results(tmp_path)[0]
    assert report._doubts(mine) == ["mine: `log_z_k_hat` 0.68", "mine: `log_mean_ratio_1` 0.00 ± 0.20"]      # 1 - 1 / log10 1000 = 0.67
    assert report._doubts(more) == ["more: `log_mean_ratio_1` 0.00 ± 0.20"]
    assert "(column *doubts*):** `mine`; `more`." in page(tmp_path)[0]


@pytest.mark.parametrize("data, metrics, said", [
    ("mnist5k", {"gain_ncp": dict(value=1.0, std_error=0.1, n=10_000)}, "10,000 generated, 1,000 real test images"),
    ("mnist5k", {"gain_ncp": dict(value=1.0, std_error=0.1, n=10_000), "frechet_base": dict(value=1.0, n=1000)},
     "10,000 generated, 1,000 real test images"),
    ("fashion_mnist", {"gain_ncp": dict(value=1.0, std_error=0.1, n=2000)}, "2,000 generated, 2,000 real test images"),
    ("folder", {"gain_ncp": dict(value=1.0, std_error=0.1, n=2000), "turns_told": dict(value=0.7, n=324)},
     "2,000 generated, 324 real test images"),
])
def test_a_distance_says_both_numbers_of_images(tmp_path, data, metrics, said):
    write(tmp_path / "r", "rae", "cpu", {"dataset": data}, metrics)
    assert table(report.sections(*report.read_results(tmp_path))["Stand-ins"])[0]["on"] == said


def test_the_numbers_of_test_images_are_those_of_the_data():
    from ncp_vae.engine.data import load
    for name in ("digits", "mnist5k", "photos32"):
        assert len(load(name, "test")) == paper.TEST_IMAGES[name]


def test_a_run_of_several_attempts_says_what_of_its_training_is_recorded(tmp_path):
    write(tmp_path / "again", attempt=2)
    runs = page(tmp_path)[1]
    assert "attempt 2, which went on from an earlier one" in runs and "training's commit is not recorded; the training's time is not" in runs
    assert "trained and scored" not in runs
    record = json.loads((tmp_path / "again" / "metrics.json").read_text())
    (tmp_path / "again" / "metrics.json").write_text(json.dumps({**record, "earlier_commits": ["0123456789" * 4]}))
    assert "begun at commit 0123456, the training's time is not recorded" in page(tmp_path)[1]


def test_each_sampler_has_its_share_seconds_and_memory_beside_the_papers(tmp_path):
    costs = {"sir_5_seconds_10": dict(value=0.5, std_error=0.1, unit="s"), "sir_5_memory": dict(value=20.0, unit="MB")}
    write(tmp_path / "s", "studies", "smoke", {}, {"sir_5_share": dict(value=0.6, std_error=0.1), **costs})
    (row,) = table(report.sections(*report.read_results(tmp_path))["What proposals and steps buy"])
    assert row["share of the excess left"] == "0.60 ± 0.10" and row[""] == "SIR, 5 proposals" and row["in the paper: FID"] == "11.75"


def test_pictures_of_the_first_seed_with_a_sentence_each(tmp_path):
    for seed in (0, 1):
        folder = write(tmp_path / f"s{seed}", given={"seed": seed})
        folder.joinpath("figures").mkdir()
        folder.joinpath("figures", "samples.png").touch()
    text = report.sections(*report.read_results(tmp_path), results="there")["Pictures"]
    assert text.count("![") == 1 and "](there/s0/figures/samples.png)\n\n*" in text and text.endswith(".*")


def test_a_record_says_what_it_is_about_whatever_its_parameters_are_called(tmp_path):
    "A run that takes up others says their data and names to finish; here its parameters say other ones."
    write(tmp_path / "part", given={"dataset": "mnist"})
    folder = write(tmp_path / "groups", "groups", "smoke", {"pattern": "nobody"}, {"nll_gain_k1": dict(value=0.8, std_error=0.1)})
    record = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**record, "data": "omniglot", "model": "dense", "parts": ["part"]}))
    runs = page(tmp_path)[1]
    assert re.search(r"\*\*`groups`\*\* .*on Omniglot", runs) and re.search(r"\*\*`part`\*\* .*on MNIST", runs)


def test_a_run_of_no_claim_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "CLAIMS", [claim for claim in paper.CLAIMS if claim.notebook != "gaussians25"])
    write(tmp_path / "toy", "gaussians25", "cpu")
    assert "**`toy`**" in page(tmp_path)[1]


@pytest.mark.parametrize("gain, spread, answer", [
    (Measured(2.0, 0.5), 0.0, "yes"), (Measured(2.2, 1.0), 0.0, "soft: yes"), (Measured(1.9, 1.0), 0.0, "no: within its error"),
    (Measured(-2.2, 1.0), 0.0, "soft: no: worse"), (Measured(-2.0, 0.5), 0.0, "no: worse"), (Measured(2.0), 0.0, "its error is not known"),
    (Measured(2.0, 0.5), 1.5, "no: within its error")])
def test_the_answer_to_whether_the_prior_beats_its_base(gain, spread, answer):
    assert report._answer(gain, spread) == answer and answer in report._MARKS


# ---- the second paper, and priors on one frozen VAE -----------------------------------------------------------------

CELLS = {"flows": """run_dir: str = ""
seed: int = 0                 # [0, inf)
kind: str = "dense"           # {dense, conv, resnet, pixel, hvae, maps}
dataset: str = "fashion_mnist"  # {static_mnist, mnist, fashion_mnist, omniglot, cifar10}
width: float = 1.0            # (0, inf)
blocks: int = 20              # [1, inf)
epochs: int = 3               # [1, inf)
variants: str = "standard"
beta: float = 1.0
min_log_std: float = -11.0
pure: bool = False
lr: float = 1e-3
hidden: int = 256
binarisations: int = 10
""", "frozen": """run_dir: str = ""
seed: int = 0                 # [0, inf)
dataset: str = "fashion_mnist"  # {mnist, fashion_mnist}
epochs: int = 40              # [1, inf)
""", **dict.fromkeys(["joint_ebm", "ood"], """run_dir: str = ""
seed: int = 0                 # [0, inf)
dataset: str = "digits"       # {digits, cifar10, celebahq256}
model: str = "nvae:digits"
inception: str = ""
protocol: str = "rae-10k-test"
ratio_width: int = 32         # [1, inf)
ncp_steps: int = 100          # [1, inf)
test_images: int = 100        # [32, inf)
""")}
FLOWS = {"nll_standard": dict(value=231.0, std_error=0.7, n=10_000, paper=228.60), "nll_joint": dict(value=228.9, std_error=0.7, n=10_000, paper=226.11),
         "nll_posterior": dict(value=230.4, std_error=0.7, n=10_000, paper=227.79), "nll_posthoc": dict(value=229.9, std_error=0.7, n=10_000),
         "gain_joint": dict(value=2.1, std_error=0.03, n=10_000), "gain_posterior": dict(value=0.6, std_error=0.04, n=10_000),
         "gain_posthoc": dict(value=1.1, std_error=0.02, n=10_000), "au_standard": dict(value=14, unit="units"), "au_joint": dict(value=64, unit="units")}


@pytest.fixture
def with_flows(tmp_path, monkeypatch):
    "A clone with small run notebooks of these names."
    folder = tmp_path / "home" / "nbs" / "runs"
    folder.mkdir(parents=True)
    for name, cell in CELLS.items():
        cells = [dict(cell_type="code", source=cell, metadata=dict(tags=["parameters"]))]
        (folder / f"{name}.ipynb").write_text(json.dumps(dict(cells=cells)))
        (folder / f"{name}.yaml").write_text("cpu: {}\nfull: " + ("{epochs: 2400}" if name in ("flows", "frozen") else "{dataset: cifar10}"))
    monkeypatch.setenv("NCP_VAE_HOME", str(tmp_path / "home"))
    return tmp_path / "results"


def test_the_second_papers_claims_have_rows_with_its_numbers_and_the_epochs(with_flows):
    write(with_flows / "dense", "flows", "cpu", {"epochs": 100}, FLOWS)
    parts = report.sections(*report.read_results(with_flows))
    texts = parts["Stand-ins"].split("**RealNVP ")[1:]
    assert [text.partition(":")[0] for text in texts] == ["Table 3", "Table 3", "Table B.6"]
    joint, posterior, posthoc = (table(text)[0] for text in texts)
    for row in (joint, posterior, posthoc):
        assert row["our model"] == "dense VAE, 1 x the paper's width, 20 blocks, 100 of its 2,400 epochs" and row["seen?"] == "**yes**"
    assert joint["base → ours"] == "231.00 ± 0.70 → 228.90 ± 0.70" and joint["gain"] == "2.100 ± 0.030 nats (n = 10,000)"
    assert joint["in the paper"] == "228.6 → 226.11" and joint["active units, higher is better"].startswith("14 → 64")
    assert posterior["gain"] == "1.500 ± 0.050 nats (n = 10,000)" and posterior["in the paper"] == "227.79 → 226.11"
    assert posthoc["gain of joint training [nats]"].startswith("2.100") and "in the paper" not in posthoc     # none is printed of DenseVAE
    assert "226.17 → 225.22 → 224.09 nats (RealNVP Table B.6, FashionMNIST)" in texts[2]
    assert [row["of"] for row in table(parts["Verdict"])] == ["RealNVP Table 3", "RealNVP Table 3", "RealNVP Table B.6"]


def test_a_gain_over_a_gain_needs_both(with_flows):
    "Without the flow posterior nothing is said of it, and the other two claims stay."
    write(with_flows / "dense", "flows", "cpu", {}, {name: number for name, number in FLOWS.items() if "posterior" not in name})
    assert len(rows(with_flows)) == 2
    shutil.rmtree(with_flows / "dense")
    write(with_flows / "dense", "flows", "cpu", {}, {name: number for name, number in FLOWS.items() if name != "gain_posterior"})
    (row,) = [row for row in rows(with_flows) if row.claim.than]
    assert row.gain.value == pytest.approx(1.5) and row.gain.std_error == pytest.approx(0.7 * 2**0.5)    # two sides that no record pairs


def test_an_experiment_of_several_values_is_run_when_all_are(with_flows):
    asked = paper.EXPERIMENTS["20 blocks, dense and PixelCNN"]
    for number, one in enumerate(paper.each(asked), 1):
        write(with_flows / str(number), "flows", "full", one["params"], FLOWS)
        parts = report.sections(*report.read_results(with_flows))
        left = f"; {number} of 8 were run"
        assert (left in parts["Not run"]) == (number < 8) and ("as well with kind = pixel and dataset" in parts["Not run"]) == (number < 8)
    assert "**Reproduced.** RealNVP Table 3" in parts["Verdict"] and "RealNVP Table 3" not in parts["Stand-ins"]
    assert re.search(r"\*\*Never run.*RealNVP Table 1 to 6,", parts["Verdict"])          # the residual net of Table 3


def test_the_page_says_which_paper_a_table_is_of(tmp_path):
    write(tmp_path / "mine")
    first, second, third = report.sections(*report.read_results(tmp_path))["The papers"].splitlines()
    assert "without a name before them" in first and "NCP-VAE" in first and "ICLR 2021" in first
    assert second.startswith("- *RealNVP*") and "Shallow VAEs with RealNVP Prior" in second and "ICLR 2020" in second
    assert third.startswith("- *EBM*") and "supplementary material" in third and "Joint Latent Space EBM Prior" in third
    assert "## The papers\n\n- Tables" in report.results_page(tmp_path)


def test_every_table_of_the_third_paper_is_told_as_never_run(tmp_path):
    "No record speaks to it: each of its tables and figures stands in the verdict and in one line of what was not run. All of RealNVP have a run."
    write(tmp_path / "mine")
    parts = report.sections(*report.read_results(tmp_path))
    assert "; EBM Table 1 to 4; EBM Figure 1 to 11. What each needs" in parts["Verdict"]
    lines = {row["for"]: row for row in table(parts["Not run"]) if "EBM" in row["for"]}
    assert list(lines) == ["EBM Table 3; EBM Figure 6, 7", "EBM Table 3; EBM Figure 4, 11", "EBM Table 4", list(lines)[-1]]
    assert list(lines)[-1] == "EBM Table 1, 2; EBM Figure 1 to 3, 5, 8 to 10" and "there is none" in lines[list(lines)[-1]]["needs"]
    assert lines["EBM Table 4"]["command"] == "`ncp-vae run ood --preset full`" and "SVHN" in lines["EBM Table 4"]["needs"]
    assert "EBM Table 5 is the layers of the networks" in parts["The runs"]
    assert "**EBM Table" not in parts["Stand-ins"] + parts["The papers' own experiments"]


def test_the_third_papers_claims_have_rows_with_its_numbers(with_flows):
    far = dict(unit="FID", n=10_000)
    names = {"base": 50.0, "ebm_longer": 25.0, "ebm": 30.0, "ebm_10": 31.0, "larger_8": 28.0}
    distances = {f"frechet_{name}": dict(value=value, std_error=1.0, **far) for name, value in names.items()}
    distances |= {f"gain_{name}": dict(value=50.0 - value, std_error=0.3, **far) for name, value in names.items() if name != "base"}
    write(with_flows / "energies", "joint_ebm", "cpu", {}, distances)
    aurocs = {"L>0": 0.2, "LLR>1": 0.8, "LLR>2": 0.9}
    write(with_flows / "told", "ood", "cpu", {}, {f"auroc_{name}_ebm": dict(value=value, std_error=0.01, unit="AUROC") for name, value in aurocs.items()})
    parts = report.sections(*report.read_results(with_flows))
    texts = dict(text.split(":", 1) for text in parts["Stand-ins"].split("**EBM ")[1:])
    assert list(texts) == ["Table 3", "Table 1", "Table 2", "Table 4"]
    energy, wider, larger, ratio = (table(text)[0] for text in texts.values())
    assert energy["base → ours"] == "50.0 ± 1.0 → 25.0 ± 1.0" and energy["gain"] == "25.00 ± 0.30 FID (n = 10,000)"
    assert wider["gain"] == "1.00 ± 0.42 FID (n = 10,000)" and wider["seen?"] == "**soft: yes**"          # of two gains, each paired with the base
    assert larger["base → ours"] == "28.0 ± 1.0 → 30.0 ± 1.0" and larger["seen?"] == "**no: worse**"
    assert ratio["base → ours"] == "0.200 ± 0.010 → 0.900 ± 0.010" and ratio["gain"] == "0.700 ± 0.014 AUROC" and ratio["seen?"] == "**yes**"
    assert "52.45 → 14.92 FID (EBM Table 3, CIFAR-10); 46.32 → 22.86 FID (EBM Table 3, CelebA-HQ-256)" in texts["Table 3"]
    assert "36.10 → 28.60 FID (EBM Table 2)" in texts["Table 2"] and "0.087 → 0.927 fraction (EBM Table 4, AUROC EBM)" in texts["Table 4"]


def frozen(folder, seed, **numbers):
    "A comparison of a flow and of a prior that this test names."
    metrics = {"nll_base": dict(value=230.0, std_error=0.8, n=10_000), "nll_realnvp": dict(value=229.0, std_error=0.8, n=10_000),
               "nll_nobodys": dict(value=228.8, std_error=0.8, n=10_000), "gain_realnvp": dict(value=1.0 + 0.2 * seed, std_error=0.03),
               "gain_nobodys": dict(value=1.5, std_error=0.02), "distance_base": dict(value=80.0, std_error=3.0, n=2000),
               "lower_by_realnvp": dict(value=30.0, std_error=1.0, unit="feature distance"),
               "lower_by_nobodys": dict(value=20.0, std_error=1.0, unit="feature distance"), "seconds_realnvp": dict(value=0.004, std_error=0.001, unit="s"),
               "train_seconds_realnvp": dict(value=120.0, unit="s"), "parameters_realnvp": dict(value=1_234_567, unit="parameters"),
               "nll_realnvp_bound": dict(value=229.5, std_error=0.8)}
    return write(folder / f"seed{seed}", "frozen", "cpu", {"seed": seed}, {**metrics, **numbers})


def test_priors_on_one_frozen_vae_are_rows_whatever_they_are_called(with_flows):
    for seed in range(3):
        frozen(with_flows, seed)
    text = report.sections(*report.read_results(with_flows))["Priors on one frozen VAE"]
    base, flow, mine = table(text)
    assert [row["prior"] for row in (base, flow, mine)] == ["N(0, I)", "RealNVP", "nobodys"]
    assert "(`seed0`, `seed1`, `seed2`)" in text and base["NLL [nats] (n = 10,000)"] == "230.00 ± 0.80" and base["gain [nats]"] == ""
    assert flow["gain [nats]"] == "1.200 ± 0.030, seeds ± 0.2" and mine["gain [nats]"] == "1.500 ± 0.020"
    assert flow["ms a sample"] == "4.0 ± 1.0" and flow["s to train"] == "120" and flow["parameters"] == "1,234,567"
    assert base["distance (n = 2,000)"] == "80.0 ± 3.0" and flow["nearer than the base by"] == "30.0 ± 1.0"


def test_a_hierarchy_shows_the_number_of_each_group(tmp_path):
    sizes = {f"ess_{k}_ncp": dict(value=value, std_error=0.5) for k, value in enumerate((20.0, 9.0))}
    write(tmp_path / "r", "priors", "cpu", {}, {"gain_ncp": dict(value=1.0, std_error=0.1), **sizes, "ess_snis": dict(value=5.0, std_error=0.5),
                                                "gain_snis": dict(value=1.0, std_error=0.1)})
    rows = table(report.sections(*report.read_results(tmp_path))["Priors on one frozen VAE"])
    assert [row["ESS"] for row in rows] == ["20.00 ± 0.50; 9.00 ± 0.50", "5.00 ± 0.50"]


def test_what_was_measured_besides_makes_no_other_model(with_flows):
    for seed in range(2):
        frozen(with_flows, seed)
    folder = with_flows / "seed1"
    params = json.loads((folder / "params.json").read_text())
    params["params"]["earlier"] = "5,10"
    (folder / "params.json").write_text(json.dumps(params))
    record = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**record, "params": params["params"]}))
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "earlier.png").write_bytes(b"")
    parts = report.sections(*report.read_results(with_flows))
    assert "(`seed0`, `seed1`)" in parts["Priors on one frozen VAE"] and "seed1/figures/earlier.png" in parts["Pictures"]


def test_the_verdict_names_the_leaders_and_whether_their_lead_is_beyond_its_error(with_flows):
    for seed in range(3):
        frozen(with_flows, seed)
    (row,) = table(report.sections(*report.read_results(with_flows))["Verdict"])
    assert list(row.values()) == ["`seed0` (3 seeds)", "nobodys, by 1.500 ± 0.020 nats, 0.300 ± 0.036 (≈) ahead of RealNVP",       # seeds ± 0.2
                                  "RealNVP, by 30.0 ± 1.0 feature distance, 10.0 ± 1.4 ahead of nobodys"]


def test_where_no_prior_is_better_the_base_leads(with_flows):
    worse = dict(value=-1.0, std_error=0.1)
    frozen(with_flows, 0, gain_realnvp=worse, gain_nobodys=worse, lower_by_realnvp=worse, lower_by_nobodys=worse)
    (row,) = table(report.sections(*report.read_results(with_flows))["Verdict"])
    assert row["best likelihood"] == row["lowest distance"] == "the base"


def test_without_such_runs_there_is_no_table_and_no_line(tmp_path):
    write(tmp_path / "mine")
    parts = report.sections(*report.read_results(tmp_path))
    assert parts["Priors on one frozen VAE"] == parts["Strange images"] == "No run." and "frozen" not in parts["Verdict"]


# ---- measures that were put right ------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, flagged", [(-1, True), (1, False)])
def test_a_number_from_before_its_measure_was_put_right_is_flagged(tmp_path, monkeypatch, seconds, flagged):
    monkeypatch.setattr(paper, "PUT_RIGHT", {"MMD^2": ["1970-01-02T00:00:00", "the kernel was another"]})
    found = {**GAIN, "mmd2_base": dict(value=0.2, std_error=0.1, unit="MMD^2"), "mmd2_budgets": dict(value=0.25, std_error=0.1, unit="MMD^2"),
             "frechet_base": dict(value=2.0, std_error=0.1, n=500), "frechet_budgets": dict(value=2.1, std_error=0.1, n=500)}
    write(tmp_path / "mine", metrics=found, ended=86_400.0 + seconds)
    text = report.sections(*report.read_results(tmp_path))["Stand-ins"]
    (row,) = table(text)
    assert row["MMD² of latents, lower is better"] == f"0.20 ± 0.10 → 0.25 ± 0.10{'†' * flagged} (≈)"
    assert "†" not in row["distance, lower is better"] + row["gain"] and "the kernel was another (until 1970-01-02)" in text


def test_a_gain_by_an_old_measure_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "PUT_RIGHT", {"raw feature distance": ["1980-01-01", "it was another"]})
    write(tmp_path / "r", "rae", "cpu", {}, {"gain_ncp": dict(value=35.0, std_error=10.0, n=100, unit="raw feature distance")})
    parts = report.sections(*report.read_results(tmp_path))
    assert table(parts["Stand-ins"])[0]["gain"] == "35 ± 10 raw feature distance† (n = 100)"
    assert "| 35 ± 10 raw feature distance†, `r` |" in parts["Verdict"].replace("\u00a0", " ")


# ---- the paper's numbers --------------------------------------------------------------------------------------------

def test_every_claim_is_about_items_numbers_and_runs_that_there_are():
    "A name in the file that no record has would leave its claim out of the page without a word."
    runs = report.read_results(home() / "results")[0]
    for claim in paper.CLAIMS:
        assert set(claim.items) <= set(paper.ITEMS) and claim.notebook in paper.NOTEBOOKS
        assert set(claim.also) <= set(paper.MEASURES) and paper.printed(claim)
        assert any(row.claim is claim for row in report._rows(runs)) and claim.notebook in notebooks(), claim.says
    for run in runs:
        assert run.experiment in paper.NOTEBOOKS and "{" not in report._about(run, "model") + report._about(run, "against")


def test_a_bound_is_no_prior():
    "`gain_bound_ncp` is a second gain of the prior `ncp`, in a column of its own, and not the gain of a prior `bound_ncp`."
    metrics = dict.fromkeys(["nll_base", "nll_ncp", "gain_ncp", "nll_bound_ncp", "gain_bound_ncp", "gain_bounded"])
    assert report._priors_of([SimpleNamespace(experiment="priors", metrics=metrics)]) == ["base", "ncp", "bounded"]


def test_no_number_of_the_file_is_remembered():
    for name, version in (("paper", "ICLR 2021"), ("realnvp", "ICLR 2020"), ("joint_ebm", "supplementary material")):
        text = (ROOT / "ncp_vae" / "engine" / f"{name}.json").read_text(encoding="utf-8")
        assert "remember" not in text and "not checked" not in text and version in json.loads(text)["source"]


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
    assert shown == list(report.sections(*report.read_results(home() / "results"), results="../results").values()), "run `ncp-vae report`"


def test_the_verdict_is_short_and_every_picture_is_there():
    parts = report.sections(*report.read_results(home() / "results"))
    lines, _, claims, _ = parts["Verdict"].split("\n\n")
    assert len(lines.splitlines()) <= 6 and lines.startswith("- **Reproduced.**") and len(table(claims)) <= len(paper.CLAIMS)
    links = re.findall(r"\]\((results/[^)]+)\)", parts["Pictures"] + parts["The runs"])
    assert len(links) > 50 and all((ROOT / link).is_file() for link in links)
