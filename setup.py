"""Builds the native kernels into a plain shared library beside token_pruning/engine/library.py.

Everything else about the package is in pyproject.toml. Where there is no C++ compiler, or it is another platform, the
installation goes on without the library, and the engine uses PyTorch.
"""

import platform
import struct
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/token_pruning/native")
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 warns of uninitialised values inside its own AVX-512 headers.
AVX512 = [
    *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
]
# Before it gives out registers, GCC moves ARM's loads so far ahead that sums do not fit any more; clang ignores this.
NEON = ["-fno-schedule-insns", "-Wno-ignored-optimization-argument"]
# Files of one kind of processor, with flags of their own.
X86 = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_avx_vnni.cpp": ["-mavx2", "-mfma", "-mavxvnni"],
    "kernels_avx512.cpp": AVX512,
    "kernels_avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
    "kernels_avx512_bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "kernels_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
ARM = {
    "kernels_neon.cpp": NEON,
    "kernels_dotprod.cpp": [*NEON, "-march=armv8.2-a+dotprod"],
    "kernels_i8mm.cpp": [*NEON, "-march=armv8.2-a+dotprod+i8mm+bf16"],
}
# What is built for, which another machine's Python says where it cross-compiles; 64-bit only.
PLATFORM = sysconfig.get_platform() if struct.calcsize("P") == 8 else ""
MACROS, LEVELS = {
    "linux-x86_64": ([("TP_X86", None)], X86),
    "linux-aarch64": ([("TP_ARM", None)], ARM),
}.get(PLATFORM, ([], {}))


class BuildKernels(build_ext):
    """Compiles every source with its own instruction set."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        objects = [
            obj
            for source in ext.sources
            for obj in self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=MACROS,
                extra_postargs=[*COMMON, *LEVELS.get(Path(source).name, [])],
                depends=ext.depends,
            )
        ]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            extra_postargs=["-pthread", "-s"],
            target_lang="c++",
        )


class PlatformWheel(bdist_wheel):
    """The library knows no Python, so one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = sorted(str(path) for path in NATIVE.glob("*.cpp") if path.name in LEVELS or path.name not in {**X86, **ARM})
library = Extension(
    "token_pruning.engine.libtoken_pruning",
    sources,
    depends=sorted(str(path) for path in NATIVE.glob("*.h")),
    language="c++",
    optional=True,
)
setup(
    ext_modules=[library] if platform.system() == "Linux" else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
