"""Builds the native CPU kernels (kernels/native/src) where there is a C++ compiler.

All else is in pyproject.toml. Without a compiler the installation goes on: every operation also
exists in plain XLA, and the first that would have used the library says so.
"""

import hashlib
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/native/src")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]


def source_hash() -> str:
    """As kernels/native/library.py makes it: of every source file, in the order of their names."""
    files = sorted(Path(__file__).parent.joinpath(SOURCES).iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def ffi_headers() -> str:
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("jaxlib must be installed to build: its headers describe XLA's calls")
    return str(Path(spec.submodule_search_locations[0]) / "include")


class BuildKernels(build_ext):
    """Installs the library into the environment even where the checkout is installed editable.

    Beside the sources it would come before the library of any other environment.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # else it would be built anew each time, in a temporary folder
            base = self.get_finalized_command("build").build_base
            kind = f"editable.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_lib = self.build_temp = os.path.join(base, kind)

    def copy_extensions_to_source(self) -> None:
        if not self.editable_mode:  # setup.py build_ext --inplace
            super().copy_extensions_to_source()
            return
        environment = Path(self.get_finalized_command("install").install_lib)
        for extension in self.extensions:
            file = self.get_ext_filename(self.get_ext_fullname(extension.name))
            if Path(self.build_lib, file).exists():  # else there was no compiler
                self.copy_file(str(Path(self.build_lib, file)), str(environment / file))


is_sanitized = bool(os.environ.get("MOESAIC_SANITIZE"))  # `make sanitize` sets it
sanitizers = SANITIZE if is_sanitized else []
library = Extension(
    "moesaic_native",
    sources=sorted(str(file) for file in SOURCES.glob("*.cc")),
    depends=sorted(str(file) for file in SOURCES.iterdir()),
    include_dirs=[ffi_headers()],
    define_macros=[("MOESAIC_SOURCE_HASH", f'"{source_hash()}"')],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-ffp-contract=fast",  # products and sums become fused multiply-adds
        "-fno-math-errno",
        "-fvisibility=hidden",
        *sanitizers,
    ],
    extra_link_args=["-pthread", *sanitizers],
    language="c++",
    optional=True,
)
# Objects of the two kinds must not meet: setuptools compares dates, not options.
build = {"build_base": "build/sanitized" if is_sanitized else "build/plain"}
setup(ext_modules=[library], options={"build": build}, cmdclass={"build_ext": BuildKernels})
