"""The site can be built without a warning, and has a page for every notebook."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_site(command):
    command("python", "docs/build.py")
    for path in (ROOT / "nbs").rglob("[!_.]*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            page = ROOT / "_docs" / path.relative_to(ROOT / "nbs").with_suffix(".html")
            code = re.findall(r"<pre>(.*?)</pre>", page.read_text(encoding="utf-8"), re.S)
            assert not any(re.search(r"^#\|", re.sub(r"<[^>]+>", "", block), re.M) for block in code), f"a directive in {page}"
