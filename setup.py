"""Builds the optional C++ extension `megatron_llm._native`; everything else about the package is in pyproject.toml.

Each function of the extension has a numpy counterpart, so an install without a compiler works and is only slower.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

sources = sorted(glob("csrc/*.cpp"))
extensions = [Pybind11Extension("megatron_llm._native", sources, cxx_std=17, optional=True)] if sources else []
setup(ext_modules=extensions)
