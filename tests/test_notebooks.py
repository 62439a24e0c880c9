"""Every chapter is executed from its first cell to its last, by nbdev's own runner, in a process of its own.

The notebooks of nbs/runs are run by the command instead: test_runs.py."""
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.relative_to(ROOT).as_posix() for folder in (".", "theory", "models", "engine")
                  for path in (ROOT / "nbs" / folder).glob("[!_.]*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs(chapter, command):
    command("nbdev_test", "--path", ROOT / chapter)
