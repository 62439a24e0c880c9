"""A stranger's VAE, written from the README alone: its code blocks are run as they stand there."""
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_gives_a_strangers_vae_a_better_prior():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    code = "\n".join(blocks)
    assert "class MyVAE" in code and "fit_ncp" in code
    model = next(block for block in blocks if "class MyVAE" in block)
    use = next(block for block in blocks if "fit_ncp(" in block)
    lines = [line for line in (model + use).splitlines() if line.strip()]
    assert len(lines) < 20, len(lines)
    scope = {}
    exec(code, scope)
    assert scope["samples"].shape == (64, 1, 8, 8) and 0 <= scope["samples"].min() <= scope["samples"].max() <= 1
    gain = scope["rows"]["NCP"]["gain"]
    assert gain.value > 2 * gain.std_error      # paired and seeded


def test_the_names_of_the_package_are_loaded_when_they_are_asked_for():
    "`import ncp_vae` alone imports no torch; each name is the one of its module."
    script = """
import sys, ncp_vae
assert "torch" not in sys.modules
for name in ncp_vae._NAMES:
    assert name in dir(ncp_vae) and getattr(ncp_vae, name).__name__ == name
from ncp_vae import SIR, FlatVAE, WithPriors
import ncp_vae.walk
assert ncp_vae.FlatVAE is ncp_vae.walk.FlatVAE
try:
    ncp_vae.SIS
except AttributeError as error:
    assert "SMC" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)
