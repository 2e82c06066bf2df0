"""What every kernel needs of a GPU: registers, shared memory and stack, compiled without one.

    python -m bench.resources            compile all kernels, print the table
    python -m bench.resources --check    print only what breaks a limit
    python -m bench.resources --write    write the table to docs/kernel-resources.md

It ends with 1 where a kernel does not compile, uses any stack, which is where spilled registers
lie, or more shared memory than a block can have; and where nvcc is not found, unless
--without-cuda leaves the CUDA sources out.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "fedspa_kernels"
PAGE = ROOT / "docs" / "kernel-resources.md"
# The most shared memory of a block: 163 KiB on an A100, 227 KiB on an H100.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
PROCESSES = 2


class Use(NamedTuple):
    """What a kernel, compiled for one architecture, needs; `shared` and `stack` are bytes."""

    source: str
    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int


def main() -> None:
    """Compile all kernels, and print or write what they need."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="print only what breaks a limit")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--without-cuda", action="store_true", help="leave the CUDA sources out")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces Triton's compiler; run bench.resources without it.")
    if not arguments.without_cuda and not shutil.which("nvcc"):
        sys.exit("nvcc is not on the PATH: install CUDA's compiler, or pass --without-cuda.")
    uses = compile_all(with_cuda=not arguments.without_cuda)
    page = write_page(uses)
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")
    elif not arguments.check:
        print(page)
    broken = [sentence for use in uses for sentence in broken_limits(use)]
    sys.exit("\n".join(broken) if broken else 0)


def compile_all(*, with_cuda: bool) -> list[Use]:
    """Compile every kernel for every architecture, two at a time, in the order of the table."""
    jobs: list[Callable[[], list[Use]]] = []
    for source in sorted(KERNELS.glob("*/triton.py")):
        for index in range(len(_compilations(source.parent.name))):
            jobs += [partial(compile_triton, source.parent.name, index, a) for a in SHARED_LIMITS]
    if with_cuda:
        # The longest first, so that no process is left alone with them.
        jobs[:0] = [partial(compile_cuda, s, a) for s in cuda_sources() for a in SHARED_LIMITS]
    with ProcessPoolExecutor(PROCESSES) as pool:
        results = [pool.submit(job) for job in jobs]
    failures = [str(error) for result in results if (error := result.exception())]
    if failures:
        sys.exit("\n".join(failures))
    return [use for result in results for use in result.result()]


def compile_triton(family: str, index: int, arch: int) -> list[Use]:
    """Compile one of a family's Triton kernels with the hints that a launch would give it.

    Triton compiles a kernel anew where 16 divides an address, or a size or stride: PyTorch's
    addresses always, sizes unless the description says otherwise.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    described = _compilations(family)[index]
    kernel, signature = described.kernel, described.signature
    hinted = "*" if described.odd_sizes else ("*", "i")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, parameter in enumerate(kernel.params)
        if signature[parameter.name].startswith(hinted)
        and signature[parameter.name] != "i1"
        and not parameter.do_not_specialize
    }
    source = ASTSource(kernel, dict(signature), dict(described.constants), attributes)
    options = {key: getattr(described, key) for key in ("num_warps", "num_stages", "maxnreg")}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        name = f"{family}/triton.py: {described.name}"
        raise RuntimeError(f"{name} does not compile for sm_{arch}: {error}") from error
    registers, stack = _read_cubin(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return [Use(f"{family}/triton.py", described.name, arch, registers, shared, stack)]


def compile_cuda(source: str, arch: int) -> list[Use]:
    """Compile the kernels of one CUDA source, and read what ptxas says of each."""
    import torch

    include = Path(torch.__file__).with_name("include")
    command = ["nvcc", "-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-isystem", str(include), "-I", str(KERNELS / "csrc"), f"-arch=sm_{arch}"]
    command += ["-cubin", "-Xptxas", "-v", "-o", os.devnull, str(KERNELS / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile for sm_{arch}:\n{done.stderr}")
    return read_ptxas(source, arch, done.stdout + done.stderr)


def read_ptxas(source: str, arch: int, said: str) -> list[Use]:
    """Read what `ptxas -v` says of each kernel of a source; one kernel is the least."""
    parts = said.split("Compiling entry function ")[1:]
    if not parts:
        raise RuntimeError(f"{source}: ptxas names no kernel for sm_{arch}; it wrote: {said}")
    uses = []
    for part in parts:
        found = re.match(
            r"'(\S+)'.*?Function properties for \1\n"
            r"\s*(\d+) bytes stack frame.*?Used (\d+) registers([^\n]*)",
            part,
            re.DOTALL,
        )
        if found is None:
            raise RuntimeError(
                f"{source}: ptxas does not say what a kernel needs; it wrote: {part}"
            )
        name, stack, registers, rest = found.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        bytes_shared = int(shared[1]) if shared else 0
        uses.append(Use(source, _readable(name), arch, int(registers), bytes_shared, int(stack)))
    return uses


def cuda_sources() -> list[str]:
    """Return the CUDA sources that CMakeLists.txt lists, relative to the kernels."""
    listed = re.search(r"set\(CUDA_SOURCES\s([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    if listed is None:
        raise RuntimeError("CMakeLists.txt has no set(CUDA_SOURCES ...)")
    return listed[1].split()


def broken_limits(use: Use) -> list[str]:
    """Return a sentence for each limit that a kernel breaks."""
    kernel = f"{use.source}: {use.kernel} on sm_{use.arch}"
    sentences = []
    if use.stack:
        sentences.append(
            f"{kernel} keeps {use.stack} bytes on the stack; spill no registers: "
            "give a thread less to hold"
        )
    if use.shared > SHARED_LIMITS[use.arch]:
        sentences.append(
            f"{kernel} takes {use.shared} bytes of shared memory and a block can have "
            f"{SHARED_LIMITS[use.arch]}; make its tiles smaller"
        )
    return sentences


def write_page(uses: list[Use]) -> str:
    """Return the table as Markdown, a line for each kernel."""
    with_cuda = any(use.source.endswith(".cu") for use in uses)
    lines: dict[tuple[str, str], dict[int, Use]] = {}
    for use in uses:
        lines.setdefault((use.source, use.kernel), {})[use.arch] = use
    archs = [f"sm_{arch}" for arch in SHARED_LIMITS]
    heads = [f"{column}, {arch}" for arch in archs for column in ("registers", "shared", "stack")]
    table = [["source", "kernel", *heads], ["---", "---", *["---:"] * len(heads)]]
    for (source, kernel), on in sorted(lines.items()):
        numbers = [str(number) for arch in SHARED_LIMITS for number in on[arch][3:]]
        if source.endswith(".cu"):
            numbers[1::3] = ["at launch"] * len(SHARED_LIMITS)
        table.append([source, f"`{kernel}`", *numbers])
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"""# What the kernels need

Written by `python -m bench.resources --write` with {_versions(with_cuda)}.

Registers are per thread; shared memory and stack are bytes, per block and per thread. Spilled
registers lie on the stack. Triton's kernels are compiled for addresses that 16 divides, and for
such sizes too unless a line says "odd sizes".

CUDA's kernels take all their shared memory at launch. Where its size is fixed or bounded, a
`static_assert` beside the kernel holds it below 99 KiB, the least that a GPU from sm_80 on has for
a block. Where it grows with a row, the launcher asks the device what a block can have, and takes
longer rows another way (`csrc/groups.cuh`).

{rows}
"""


def _compilations(family: str) -> list[Any]:
    return importlib.import_module(f"fedspa_kernels.{family}.triton").compilations()


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the stack of the one kernel in a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return read_cuobjdump(usage)


def read_cuobjdump(usage: str) -> tuple[int, int]:
    """Return the registers and the stack that cuobjdump tells of one kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers; it wrote: {usage}")
    return int(found[1]), int(found[2]) + int(found[3])


def _readable(mangled: str) -> str:
    """Return a kernel's name with its template arguments, as far as a demangler is there."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], check=True, capture_output=True, text=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|fedspa::|^void ", "", name.strip())
    return name[: name.index(">(") + 1] if ">(" in name else name.partition("(")[0]


def _versions(with_cuda: bool) -> str:
    import triton
    from triton import knobs

    versions = f"Triton {triton.__version__} (ptxas {knobs.nvidia.ptxas.version})"
    if not with_cuda:
        return f"{versions} and without nvcc"
    answer = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    release = re.search(r"V([\d.]+)", answer.stdout)
    return f"{versions} and nvcc {release[1] if release else 'of an unknown version'}"


if __name__ == "__main__":
    main()
