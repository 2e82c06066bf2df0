"""What bench.resources reads from compilers, and what it refuses: nothing is compiled here."""

import sys

import pytest

from bench import resources
from bench.resources import Use, broken_limits, read_cuobjdump, read_ptxas

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mirror' for 'sm_80'
ptxas info    : Function properties for mirror
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 380 bytes cmem[0]
ptxas info    : Compile time = 5.123 ms
ptxas info    : Compiling entry function 'sweep' for 'sm_80'
ptxas info    : Function properties for sweep
    48 bytes stack frame, 52 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 4096 bytes smem
"""
CUOBJDUMP = """\
Resource usage:
 Common:
  GLOBAL:0
 Function _mirror:
  REG:40 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:404 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_ptxas_is_read_kernel_by_kernel():
    assert read_ptxas("some.cu", 80, PTXAS) == [
        Use("some.cu", "mirror", 80, 28, 0, 0),
        Use("some.cu", "sweep", 80, 255, 4096, 48),
    ]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("", "some.cu: ptxas names no kernel for sm_80"),
        (PTXAS.replace("entry function", "kernel"), "ptxas names no kernel for sm_80"),
        (PTXAS.replace("255 registers", "255 regs"), "does not say what a kernel needs"),
        (PTXAS.replace("0 bytes stack frame", "no stack frame"), "does not say what a kernel"),
    ],
)
def test_what_ptxas_does_not_say_is_an_error(said, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        read_ptxas("some.cu", 80, said)


def test_cuobjdump_counts_local_memory_as_stack():
    assert read_cuobjdump(CUOBJDUMP) == (40, 24)
    with pytest.raises(RuntimeError, match="cuobjdump tells no registers"):
        read_cuobjdump("Resource usage:")


def test_limits_are_kept_to_the_byte():
    within = Use("some.cu", "sweep", 80, 255, 163 * 1024, 0)
    assert broken_limits(within) == []
    [sentence] = broken_limits(within._replace(stack=4))
    assert sentence.startswith("some.cu: sweep on sm_80 keeps 4 bytes on the stack")
    [sentence] = broken_limits(within._replace(shared=163 * 1024 + 1))
    assert "takes 166913 bytes of shared memory and a block can have 166912" in sentence
    assert broken_limits(within._replace(shared=163 * 1024 + 1, arch=90)) == []


def test_cuda_is_not_left_out_in_silence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(resources.shutil, "which", lambda tool: None)
    monkeypatch.setattr(sys, "argv", ["resources", "--check"])
    with pytest.raises(SystemExit, match="nvcc is not on the PATH: .* pass --without-cuda"):
        resources.main()


def test_every_cuda_source_is_listed():
    there = {f"{path.parent.name}/cuda.cu" for path in resources.KERNELS.glob("*/cuda.cu")}
    assert set(resources.cuda_sources()) == there
