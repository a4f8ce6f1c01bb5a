"""Builds the extensions where torch is importable at build time; needs nothing otherwise.

An isolated build (plain ``pip install .``) has no torch, and must not download it a second time: it
makes a pure wheel that carries the C++ sources, and the CPU extension compiles itself at first use.
The CUDA kernels are a library of their own, built where nvcc is and torch is a CUDA build, unless
FASTVLM_CUDA=0. Nothing here looks at the hardware.
"""

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


# what builds the libraries is part of the package, and imports nothing of torch
sys.path.insert(0, str(ROOT))


def _builder(file="extension.py"):
    """A file of fastvlm by its path: the packages it lies in would import torch."""
    spec = importlib.util.spec_from_file_location("fastvlm_builder", ROOT / "fastvlm" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WANTED = os.environ.get("FASTVLM_CPU") != "0" and importlib.util.find_spec("torch") is not None


class BuildPy(build_py):
    """The package, its C++ sources, and the library where it can be compiled."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # csrc stands beside the package, and the library belongs in the cache
        package = Path(self.build_lib) / "fastvlm"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        self.build_cuda(package)
        builder = _builder()
        (package / builder.LIBRARY).unlink(missing_ok=True)  # of an earlier build
        if not WANTED:
            return
        try:
            library = builder.build(Path(self.build_temp_dir()))
            shutil.copy2(library, package / builder.LIBRARY)
        except Exception as error:
            # a broken toolchain must not stop the install: the reference serves, and says why
            warnings.warn(f"fastvlm: the CPU extension was not compiled: {error}", stacklevel=1)

    def build_cuda(self, package):
        builder = _builder("cuda/library.py")
        (package / builder.LIBRARY).unlink(missing_ok=True)
        if not cuda_wanted():
            return  # `python -m fastvlm env` says why
        try:
            library = builder.build(Path(self.build_temp_dir()) / "cuda")
            shutil.copy2(library, package / builder.LIBRARY)
        except Exception as error:
            warnings.warn(f"fastvlm: the CUDA kernels were not compiled: {error}", stacklevel=1)

    def build_temp_dir(self):
        return self.get_finalized_command("build").build_temp


def cuda_wanted():
    return (
        importlib.util.find_spec("torch") is not None and not _builder("cuda/library.py").missing()
    )


class MaybeBinary(Distribution):
    """A wheel with a compiled library belongs to a platform, one without belongs to all."""

    def has_ext_modules(self):
        return WANTED or cuda_wanted()


class BdistWheel(bdist_wheel):
    """One wheel of a platform serves every Python: the libraries know torch's stable ABI alone."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=MaybeBinary)
