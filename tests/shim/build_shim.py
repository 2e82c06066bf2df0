"""Compiles CUDA sources for the CPU: `python tests/shim/build_shim.py LIBRARY.so`, or `build`."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels" / "fedspa_kernels"
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC"]
FLAGS += ["-fvisibility=hidden", "-fno-strict-aliasing", f"-I{HERE}", f"-I{KERNELS / 'csrc'}"]
# sanitizer.cpp answers these checks; the linker is not told of them, or it would want libubsan.
FLAGS += ["-fsanitize=alignment,bounds,shift-exponent", "-fno-sanitize-recover=all"]


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, or the first one that is found; [] where none is."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    return named or found[:1]


def build(target: Path, sources: Sequence[Path], *, torch_dir: Path | None = None) -> None:
    """Compile the sources and the shim into one library; with torch_dir, against torch.

    raises: subprocess.CalledProcessError where a source does not compile
    """
    compiler = find_compiler()
    flags, libraries = [*FLAGS, *fused_products()], []
    if torch_dir is not None:
        flags += [
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-isystem",
            str(torch_dir / "include"),
        ]
        libraries = [str(torch_dir / "lib" / "libtorch_cpu.so")]
    every = [*sources, *sorted(HERE.glob("*.cpp"))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [f"{folder}/{i}.o" for i in range(len(every))]
        commands = [
            [*compiler, *flags, "-x", "c++", "-c", str(source), "-o", made]
            for source, made in zip(every, objects, strict=True)
        ]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        link = [*compiler, "-shared", "-Wl,-z,defs", *objects, *libraries, "-o", str(target)]
        subprocess.run(link, check=True)


def fused_products() -> list[str]:
    """Let products fuse with sums where the CPU can, as nvcc does: it shows a missing __fmul_rn."""
    information = Path("/proc/cpuinfo")
    fma = information.is_file() and " fma " in information.read_text()
    return ["-mfma", "-ffp-contract=fast"] if fma else ["-ffp-contract=fast"]


def build_library(target: Path) -> None:
    """Compile all cuda.cu: what is loaded in place of the native library, for CPU tensors."""
    import torch

    sources = [KERNELS / "csrc" / "schemas.cpp", *sorted(KERNELS.glob("*/cuda.cu"))]
    build(target, sources, torch_dir=Path(torch.__file__).parent)


if __name__ == "__main__":
    build_library(Path(sys.argv[1]))
