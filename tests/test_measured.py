"""What a quoted number must say, and what is refused."""
import math
import subprocess
import sys

import pytest
import torch

from ncp_vae.measured import Measured, mean_of


def test_a_mean_and_its_error():
    four = mean_of(torch.tensor([1.0, 2.0, 3.0, 4.0]), "lower bound", "bits/dim")
    assert four == Measured(2.5, (5 / 3 / 4) ** 0.5, "lower bound", 4, "bits/dim")
    assert mean_of(torch.ones(1)).std_error is None        # one row says nothing of its error


def test_a_shared_error_is_added_in_quadrature_and_does_not_fall_with_n():
    for n in (100, 10_000):
        assert mean_of(torch.zeros(n), shared_error=0.3).std_error == pytest.approx(0.3)
    assert mean_of(torch.tensor([-1.0, 1.0]), shared_error=0.6).std_error == pytest.approx(math.hypot(1, 0.6))


def test_tensors_and_arrays_of_one_number_are_numbers():
    found = Measured(torch.tensor([2.5]), torch.tensor(0.5))
    assert found == Measured(2.5, 0.5) and isinstance(found.value, float)


@pytest.mark.parametrize("wrong, word", [
    (dict(value=float("nan")), "value must be finite"), (dict(value=None), "value must be one number"),
    (dict(value=torch.zeros(2)), "value must be one number"), (dict(value=1, std_error=float("nan")), "std_error must be finite"),
    (dict(value=1, std_error=-0.1), "std_error must not be negative, got -0.1"), (dict(value=1, paper="27%"), "paper must be"),
    (dict(value=1, kind="bound"), "kind is one of exact, lower bound, upper bound, estimate; got 'bound'"),
    (dict(value=1, n=0), "at least 1, got 0"), (dict(value=1, n=2.5), "got 2.5"), (dict(value=1, n=True), "got True")])
def test_what_is_no_result_is_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        Measured(**wrong)


def test_it_says_what_it_is():
    assert str(Measured(-86.21, 0.07, "lower bound", 10_000)) == "-86.210 +- 0.070 nats (lower bound, n = 10,000)"
    assert str(Measured(1234.5, float("inf"))) == "1,234 nats (estimate)"            # an error without limit: no digits
    assert str(Measured(0.25, kind="exact", unit="fraction")) == "0.25 fraction (exact)"


def test_a_record_is_read_without_torch():
    code = "import sys, ncp_vae.measured; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_negative_of_a_lower_bound_is_an_upper_bound():
    nll = -Measured(-86.0, 0.1, "lower bound", 10)
    assert nll == Measured(86.0, 0.1, "upper bound", 10) and -nll == Measured(-86.0, 0.1, "lower bound", 10)
    assert (-Measured(1.0)).kind == "estimate"
