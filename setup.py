"""Packaging: the top-level folders are the sub-packages of the virtual namespace `wsi_rt`."""

from setuptools import find_packages, setup

FOLDERS = ("export", "runtime", "kernels", "benchmarks")

setup(
    name="wsi-rt",
    package_dir={f"wsi_rt.{f}": f for f in FOLDERS},
    packages=[f"wsi_rt.{f}" for f in FOLDERS] + [f"wsi_rt.{f}.{p}" for f in FOLDERS for p in find_packages(f)],
    package_data={"wsi_rt.kernels": ["resources.json"]},
)
