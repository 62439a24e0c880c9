"""A stranger's VAE, written from the README alone: its code blocks are run as they stand there."""
import re
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
    gain = scope["scores"].gain
    assert gain.value > 2 * gain.std_error      # paired and seeded
