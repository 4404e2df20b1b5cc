"""Lists the packages below the three source folders; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"graphwright": "optimizer", "graphwright.passes": "passes", "graphwright.kernels": "kernels"}

setup(
    packages=[name for top, folder in FOLDERS.items() for name in (top, *(f"{top}.{p}" for p in find_packages(folder)))]
)
