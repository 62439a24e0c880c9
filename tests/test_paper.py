"""The papers' numbers: typed by somebody, so whatever is printed twice must agree, and every name is found or refused."""
import re

import pytest

from ncp_vae.engine import paper

DATA = ("StaticMNIST", "MNIST", "FashionMNIST", "Omniglot")


def realnvp(table, row, column=""):
    return paper.value(f"RealNVP {table}", row, column)


def test_every_table_and_figure_of_the_papers_is_there_once():
    first = [name for name in paper.ITEMS if name.startswith(("Table", "Figure"))]
    numbers = [int(name.split()[1]) for name in first]
    assert numbers[:9] == list(range(1, 10)) and sorted(numbers[9:] + [1, 2, 5]) == list(range(1, 13))
    third = [name for name in paper.ITEMS if name.startswith("EBM ")]
    assert third == [f"EBM Table {k}" for k in range(1, 5)] + [f"EBM Figure {k}" for k in range(1, 12)] and "EBM Table 5" in paper.ELSEWHERE
    second = [name.removeprefix("RealNVP ") for name in paper.ITEMS if name not in first + third]
    assert second == [f"Table {k}" for k in range(1, 7)] + [f"Table B.{k}" for k in range(1, 24)] + \
        [f"Figure {k}" for k in range(1, 6)] + [f"Figure B.{k}" for k in range(1, 11)]


@pytest.mark.parametrize("item", paper.ITEMS.values(), ids=paper.ITEMS)
def test_a_number_has_one_place_and_is_what_value_gives(item):
    places = [(row.model, row.column) for row in item.rows]
    assert len(places) == len(set(places)) and item.shows.endswith(".")
    assert len({row.column for row in item.rows}) * len({row.model for row in item.rows}) == len(places)
    for row in item.rows:
        assert vars(row).keys() - {"note"} == {"model", "printed", "unit", "metric", "column"}
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-\d+)?( ± \d\.\d\d)?", row.printed)
        assert paper.value(item.name, row.model, row.column) == float(row.printed.split(" ± ")[0])


def test_the_sources_name_the_papers_with_their_versions():
    first, second, third = paper.SOURCES.values()
    assert "supplementary material" in third and "Joint Latent Space EBM Prior" in third and "without its main paper" in third
    assert all("EBM" in called for called, source in paper.SOURCES.items() if source == third)
    assert "ICLR 2021" in first and "ICLR 2020" in second and "anonymous" in second and "RealNVP" in second
    assert all("RealNVP" in called for called, source in paper.SOURCES.items() if source == second)


def test_value_gives_what_is_printed():
    assert paper.value("Table 4", "NCP-VAE") == 78.10 and paper.value("Figure 11", "NCP-VAE") == -0.954
    assert realnvp("Table 3", "DenseVAE, standard", "FashionMNIST") == 228.60
    assert realnvp("Table B.12", "ConvVAE, standard", "FashionMNIST") == 227.51
    assert realnvp("Table B.6", "post-hoc", "FashionMNIST") == 225.22
    assert realnvp("Table B.3", "standard, min logstd = 1", "NLL") == 184.16


@pytest.mark.parametrize("call, words", [
    (lambda: paper.value("Table 4", "NCP"), "no row of Table 4 is called 'NCP'; did you mean"),
    (lambda: paper.value("Table 40", "NCP-VAE"), "did you mean 'Table 4'"),
    (lambda: paper.value("Table 4", "what there was to gain"), "no row of Table 4"),
    (lambda: paper.value("Table 4", "NCP-VAE", "MNIST"), "no column of Table 4 is called 'MNIST'"),
    (lambda: paper.item("Figure 5"), "Figure 5 is no experiment"),
    (lambda: paper.item("EBM Table 5"), "EBM Table 5 is no experiment"),
    (lambda: paper.value("EBM Table 4", "L>9", "AUROC"), "no column of EBM Table 4 is called 'AUROC'; did you mean"),
    (lambda: paper.value("EBM Table 4", "LLR>6", "AUROC EBM"), "no row of EBM Table 4 is called 'LLR>6'"),
    (lambda: paper.item("Tabel 4"), "no table or figure of the papers is called 'Tabel 4'"),
    (lambda: paper.value("Figure 2", "NCP-VAE"), "Figure 2 is no experiment"),
    (lambda: realnvp("Table 7", "DenseVAE"), "no table or figure of the papers is called 'RealNVP Table 7'"),
    (lambda: realnvp("Table 3", "ConvVAE, standard", "MNIST"), "no row of RealNVP Table 3 is called 'ConvVAE, standard'; did you mean"),
    (lambda: realnvp("Table 3", "DenseVAE, standard"), "no column of RealNVP Table 3 is called ''; there are: StaticMNIST, MNIST"),
    (lambda: realnvp("Table 3", "DenseVAE, standard", "Fashion"), "no column of RealNVP Table 3 is called 'Fashion'; did you mean 'FashionMNIST'"),
])
def test_an_unknown_name_is_refused(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


@pytest.mark.parametrize("short, long", [
    ("Table 1", "Table B.8"), ("Table 2", "Table B.9"), ("Table 3", "Table B.12"), ("Table 4", "Table B.13"),
    ("Table 6", "Table B.18"), ("Table B.6", "Table B.20")])
def test_a_table_is_part_of_its_double(short, long):
    "The appendix repeats the tables of the text, with deviations and further rows."
    for row in paper.item(f"RealNVP {short}").rows:
        assert realnvp(long, row.model, row.column) == float(row.printed)


@pytest.mark.parametrize("data", DATA)
def test_the_residual_net_is_the_same_in_every_table(data):
    for prior, others in {
            "standard": [("Table B.6", "none"), ("Table B.15", "K = 0"), ("Table B.21", "ResnetVAE, standard")],
            "RNVP p(z)": [("Table B.6", "joint"), ("Table B.15", "K = 20"), ("Table B.21", "ResnetVAE, RNVP p(z)")]}.items():
        numbers = {realnvp(table, row, data) for table, row in others}
        assert numbers == {realnvp("Table B.12", f"ResnetVAE, {prior}", data)}
    fifty = {"StaticMNIST": "Table B.8", "MNIST": "Table B.9", "FashionMNIST": "Table B.11", "Omniglot": "Table B.10"}
    assert realnvp("Table B.15", "K = 50", data) == realnvp(fifty[data], "ResnetVAE + RNVP p(z), K = 50")


def test_twenty_blocks_in_one_place_are_those_of_the_other_tables():
    for where, model in (("q(z|x), K = 2K'", "RNVP q(z|x)"), ("p(z), K = 2K'", "RNVP p(z)")):
        assert realnvp("Table B.13", where, "K' = 10") == realnvp("Table B.12", f"ResnetVAE, {model}", "MNIST")
        assert abs(realnvp("Table B.14", where, "K' = 10") - realnvp("Table B.18", model, "MNIST, recons")) < 0.0051


@pytest.mark.parametrize("table", ["Table 6", *(f"Table B.{k}" for k in (16, 17, 18, 19, 23))])
def test_the_bound_is_reconstruction_less_divergence(table):
    "Of three numbers rounded to 0.01 each."
    for model in {row.model for row in paper.item(f"RealNVP {table}").rows}:
        for data in DATA:
            elbo, recons, kl, rest = (realnvp(table, model, f"{data}, {what}") for what in ("elbo", "recons", "kl", "kl_z|x"))
            assert abs(elbo - (recons - kl)) < 0.0151, (model, data)
            assert 0 < rest < kl


@pytest.mark.parametrize("table, kind", [("Table B.16", "DenseVAE"), ("Table B.17", "ConvVAE"), ("Table B.18", "ResnetVAE"), ("Table B.19", "PixelVAE")])
def test_the_bound_and_the_likelihood_differ_by_the_posteriors_divergence(table, kind):
    "log p(x) = ELBO + KL(q(z|x)‖p(z|x)), where log p(x) is the importance-weighted estimate of the same model."
    for model in ("standard", "RNVP q(z|x)", "RNVP p(z)"):
        for data in DATA:
            nll = -(realnvp(table, model, f"{data}, elbo") + realnvp(table, model, f"{data}, kl_z|x"))
            assert abs(nll - realnvp("Table B.12", f"{kind}, {model}", data)) < 0.0151, (model, data)


def test_what_a_post_hoc_flow_leaves_as_it_was():
    for data in DATA:
        assert realnvp("Table B.7", "post-hoc", f"{data}, au") == realnvp("Table 5", "standard", data)
        assert abs(realnvp("Table B.7", "post-hoc", f"{data}, recons") - realnvp("Table B.18", "standard", f"{data}, recons")) < 0.051


def test_the_ratio_of_deviations_is_that_of_the_two():
    for row in {row.model for row in paper.item("RealNVP Table B.3").rows}:
        low, learned, ratio = (realnvp("Table B.3", row, column) for column in ("min std", "std", "min std / std"))
        assert abs(low / learned - ratio) < 0.0008        # all three are rounded to 1e-4, and std is at least 0.05


@pytest.mark.parametrize("name, printed", {          # as the supplement prints them, row by row
    "Table 1": "69.73 68.45 67.88 66.32",
    "Table 2": "28.60 42.03 39.82 37.75 36.10",
    "Table 4": "0.066 / 0.087 | 0.339 / 0.319 | 0.997 / 0.999 | 0.307 / 0.324 | 0.427 / 0.438 | 0.970 / 0.972 | 0.436 / 0.449 | 0.514 / 0.528 "
               "| 0.942 / 0.942 | 0.866 / 0.870 | 0.855 / 0.858 | 0.230 / 0.227 | 0.885 / 0.927 | 0.876 / 0.918 | 0.200 / 0.113",
    "Figure 2": "79.57 49.50", "Figure 3": "66.37 25.87"}.items())
def test_the_energy_papers_numbers_are_those_of_its_supplement(name, printed):
    assert [row.printed for row in paper.item(f"EBM {name}").rows] == re.findall(r"[\d.]+", printed)


def test_the_energy_papers_numbers_have_these_places():
    assert paper.value("EBM Table 1", "100 hidden units") == 66.32 and paper.value("EBM Table 2", "joint EBM prior") == 28.60
    assert paper.value("EBM Table 2", "Gaussian prior, same generator") == 42.03
    assert paper.value("EBM Table 4", "L>9", "FPR80 EBM") == 0.227 and paper.value("EBM Table 4", "LLR>9", "AUPRC BIVA") == 0.876
    assert paper.value("EBM Figure 3", "BIVA with EBM") == 25.87
    for data, printed in (("CIFAR-10", "52.45 14.92 130 10 7.6 30"), ("CelebA-HQ-256", "46.32 22.86 365 9 2.4 20")):
        assert " ".join(row.printed for row in paper.item("EBM Table 3").rows if row.column == data) == printed


@pytest.mark.parametrize("data", ["CIFAR-10", "CelebA-HQ-256"])
def test_the_energys_share_of_the_parameters_is_that_of_the_two(data):
    "Of two numbers of millions and a share that is rounded, or cut, to a tenth of a percent."
    ebm, nvae, share = (paper.value("EBM Table 3", row, data)
                        for row in ("parameters of the EBM", "parameters of NVAE", "the EBM's parameters, of NVAE's"))
    assert 100 * (ebm - 0.5) / (nvae + 0.5) < share + 0.1 and share - 0.05 < 100 * (ebm + 0.5) / (nvae - 0.5)


@pytest.mark.parametrize("name, order", [
    ("Table 1", [f"{k} hidden units" for k in (10, 20, 50, 100)]),
    ("Table 2", [f"Gaussian prior, {k}" for k in ("same generator", *(f"{k} times the parameters" for k in (2, 4, 8)))] + ["joint EBM prior"])])
def test_what_the_supplement_says_of_its_tables_holds_of_the_numbers(name, order):
    "A wider EBM is better; a larger generator is better, and the EBM on the small one better than all."
    numbers = [paper.value(f"EBM {name}", row) for row in order]
    assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize("what, better", [("AUROC", 1), ("AUPRC", 1), ("FPR80", -1)])
@pytest.mark.parametrize("model", ["BIVA", "EBM"])
def test_detection_gets_better_with_k_and_best_with_the_ratio(what, better, model):
    numbers = [better * paper.value("EBM Table 4", row, f"{what} {model}") for row in ("L>0", "L>3", "L>6", "L>9", "LLR>9")]
    assert numbers == sorted(numbers) and all(0 <= abs(number) <= 1 for number in numbers)
    assert numbers[-1] <= better * paper.value("EBM Table 4", "LLR>9", f"{what} EBM")


def test_a_list_of_values_is_one_run_for_each():
    asked = dict(experiment="flows", preset="full", params=dict(kind=["dense", "conv"], blocks=20, dataset=["mnist", "omniglot"]))
    assert [one["params"] for one in paper.each(asked)] == [
        dict(kind=kind, blocks=20, dataset=dataset) for kind in ("dense", "conv") for dataset in ("mnist", "omniglot")]
    assert all(one["preset"] == "full" for one in paper.each(asked))
    single = paper.EXPERIMENTS["gaussians25"]
    assert paper.each(single) == [single]


def test_a_claim_is_printed_with_its_table_and_column():
    assert [paper.printed(claim) for claim in paper.CLAIMS if claim.notebook in ("joint_ebm", "ood")][1:] == [
        "69.73 → 66.32 FID (EBM Table 1)", "36.10 → 28.60 FID (EBM Table 2)", "0.087 → 0.927 fraction (EBM Table 4, AUROC EBM)"]
    joint, posterior, posthoc = (paper.printed(claim) for claim in paper.CLAIMS if claim.notebook == "flows")
    assert joint == "228.60 → 226.11 nats (RealNVP Table 3, FashionMNIST)"
    assert posterior == "227.79 → 226.11 nats (RealNVP Table 3, FashionMNIST)"
    assert posthoc == "226.17 → 225.22 → 224.09 nats (RealNVP Table B.6, FashionMNIST)"
