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
FLAGS += ["-fvisibility=hidden", "-fno-strict-aliasing", f"-I{HERE}"]
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
    with tempfile.TemporaryDirectory() as folder:
        every = [*sources, *sorted(HERE.glob("*.cpp"))]
        link(target, compile_all(Path(folder), every, torch_dir=torch_dir), torch_dir=torch_dir)


def compile_all(
    folder: Path,
    sources: Sequence[Path],
    *,
    torch_dir: Path | None = None,
    kernels: Path = KERNELS,
) -> list[Path]:
    """Compile the sources into objects in a folder; kernels: where csrc/ with the headers is."""
    flags = [*FLAGS, *fused_products(), f"-I{kernels / 'csrc'}"]
    if torch_dir is not None:
        flags += [
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-isystem",
            str(torch_dir / "include"),
        ]
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]
    commands = [
        [*find_compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    return objects


def link(target: Path, objects: Sequence[Path], *, torch_dir: Path | None = None) -> None:
    """Link objects into one library, with nothing left undefined."""
    libraries = [] if torch_dir is None else [str(torch_dir / "lib" / "libtorch_cpu.so")]
    command = [*find_compiler(), "-shared", "-Wl,-z,defs", *map(str, objects), *libraries]
    subprocess.run([*command, "-o", str(target)], check=True)


def fused_products() -> list[str]:
    """Let products fuse with sums where the CPU can, as nvcc does: it shows a missing __fmul_rn."""
    information = Path("/proc/cpuinfo")
    fma = information.is_file() and " fma " in information.read_text()
    return ["-mfma", "-ffp-contract=fast"] if fma else ["-ffp-contract=fast"]


def cuda_sources(kernels: Path = KERNELS) -> list[Path]:
    """All cuda.cu, and the schemas of their operators."""
    return [kernels / "csrc" / "schemas.cpp", *sorted(kernels.glob("*/cuda.cu"))]


def build_library(target: Path) -> None:
    """Compile all cuda.cu: what is loaded in place of the native library, for CPU tensors."""
    import torch

    build(target, cuda_sources(), torch_dir=Path(torch.__file__).parent)


if __name__ == "__main__":
    build_library(Path(sys.argv[1]))
