"""Packaging. Every value is read from settings.ini; change it there."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    # the run notebooks travel as ncp_vae/runs; the paper's numbers lie beside the module that reads them
    packages=[*find_packages(include=["ncp_vae", "ncp_vae.*"]), "ncp_vae.runs"],
    package_dir={"ncp_vae.runs": "nbs/runs"},
    package_data={"ncp_vae.runs": ["*.ipynb", "*.yaml"], "ncp_vae.engine": ["*.json"]},
    python_requires=f">={settings['min_python']},<3.14",
    install_requires=settings["requirements"].split(),
    extras_require={
        "run": settings["run_requirements"].split(),
        "pythae": settings["pythae_requirements"].split(),
        "dev": " ".join(settings[f"{name}_requirements"] for name in ("run", "pythae", "dev")).split(),
    },
    entry_points={"console_scripts": settings["console_scripts"].split("\n")},
)
