"""Builds tinychat._kernels from kernels/; everything else about the package is in pyproject.toml.

TINYCHAT_PURE=1, or a machine without a C compiler, installs tinychat without the extension: it then
runs on the NumPy reference executor and says so when a model is loaded.
"""
import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

GENERATED = "kernels/_kernels.c"  # Cython writes it beside the .pyx

# No -march: the files of one instruction set say so themselves, and dispatch.c chooses at run time.
# Contraction is off so that a product and a sum round alike in a vector loop and in its tail.
COMPILE = ["-O3", "-std=gnu11", "-pthread", "-ffp-contract=off", "-fno-math-errno",
           "-fno-trapping-math", "-fvisibility=hidden", "-g0"]


def kernels() -> list[Extension]:
    if os.environ.get("TINYCHAT_PURE", "0") not in ("", "0"):
        print("tinychat: TINYCHAT_PURE is set, so the native kernels are left out")
        return []
    sources = sorted(path.replace(os.sep, "/") for path in glob("kernels/*.c"))
    return [Extension(
        "tinychat._kernels",
        sources=["kernels/_kernels.pyx", *(path for path in sources if path != GENERATED)],
        depends=sorted(glob("kernels/*.h") + glob("kernels/*.px[di]") + glob("kernels/*.md")),
        include_dirs=["kernels"],
        libraries=["m"],
        extra_compile_args=COMPILE,
        extra_link_args=["-pthread"],
        optional=True,
    )]


class SourceDistribution(sdist):
    """With whole tests: setuptools by itself takes tests/test_*.py, without what they need."""

    def make_distribution(self):
        found = glob("tests/**", recursive=True) + glob("examples/*.py") + glob(".ci/*")
        self.filelist.extend(path for path in found
                             if os.path.isfile(path) and "__pycache__" not in path)
        super().make_distribution()


setup(ext_modules=kernels(), cmdclass={"sdist": SourceDistribution})
