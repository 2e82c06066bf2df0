"""The stand-in for a GPU follows CUDA's rules, and says so where a kernel breaks one."""

import ctypes
import re
from pathlib import Path

import build_shim
import numpy as np
import pytest
import torch

BLOCKS, BLOCK = 2, 256


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    if not build_shim.find_compiler():
        pytest.skip("there is no C++ compiler")
    target = tmp_path_factory.mktemp("shim") / "small_kernels.so"
    build_shim.build(target, [Path(__file__).with_name("small_kernels.cu")])
    return ctypes.CDLL(str(target))


@pytest.fixture
def run(library):
    """Run a case; return its output and what was wrong with it."""

    def run_case(name: str) -> tuple[np.ndarray, str]:
        out = np.zeros(BLOCKS * BLOCK, np.uint32)
        message = ctypes.create_string_buffer(1000)
        pointer = ctypes.c_void_p(out.ctypes.data)
        library.run_case(name.encode(), pointer, message, ctypes.c_size_t(len(message)))
        return out, message.value.decode()

    return run_case


THREADS = np.tile(np.arange(BLOCK), BLOCKS)
LANES = THREADS % 32
THIRDS = sum(1 << lane for lane in range(0, 32, 3))
EQUALS = np.array([sum(1 << lane for lane in range(first, 32, 4)) for first in range(4)])

RIGHT = {
    "reverse": BLOCK - 1 - THREADS,
    "use_twice": np.full_like(THREADS, 3),
    "neighbour_in_warp": THREADS ^ 1,
    "reduce": np.full_like(THREADS, BLOCK * (BLOCK - 1) // 2),
    "scan_of_eights": LANES % 8 + 1,
    "votes": THIRDS ^ EQUALS[LANES % 4],
    "half_warps": np.where(LANES < 16, 20, 3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_gives_the_right_numbers(run, name):
    out, message = run(name)
    assert message == ""
    np.testing.assert_array_equal(out, RIGHT[name])


def test_atomics_of_all_threads_are_counted(run):
    out, message = run("histogram")
    assert message == ""
    assert out[:6].tolist() == [128, 128, 128, 128, BLOCKS * BLOCK - 1, 0xFFFFFFFF]


def test_blocks_run_from_the_last_to_the_first(run):
    assert run("last_block")[0][0] == 0


@pytest.mark.parametrize("name", ["reverse", "use_twice", "neighbour_in_warp"])
def test_a_missing_barrier_gives_wrong_numbers(run, name):
    out, _ = run(f"{name}_without_barrier")
    assert (out != RIGHT[name]).any()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("barrier_in_a_branch", "a barrier without all threads of the block"),
        ("two_barriers", "a barrier without all threads of the block"),
        ("write_behind", "a write outside the 1024 bytes of shared memory"),
        ("write_before", "a write outside the 1024 bytes of shared memory"),
        ("shuffle_with_absent_lane", "for lane 5, but thread .* has exited"),
        ("shuffle_beyond_the_block", "for lane 16, which the block does not have"),
        ("shuffle_outside_own_mask", "is not in the mask that it passes"),
        ("shuffle_from_outside_mask", "reads lane 16, which is not in its mask"),
        ("misaligned_vector", "a misaligned pointer at .*small_kernels.cu"),
        ("index_outside_of_array", "an index outside of an array"),
        ("shift_by_32", "a shift by a negative number or by too many bits"),
        ("too_much_shared_memory", "beyond CUDA's limits"),
        ("too_many_threads", "beyond CUDA's limits"),
        ("too_many_rows_of_blocks", "beyond CUDA's limits"),
    ],
)
def test_a_broken_rule_is_an_error(run, name, sentence):
    _, message = run(name)
    assert re.search(sentence, message), message
    # The next launch is not the worse for it.
    out, message = run("reduce")
    assert message == ""
    np.testing.assert_array_equal(out, RIGHT["reduce"])


def test_all_of_the_shared_memory_can_be_had(run):
    assert run("all_shared_memory")[1] == ""


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_every_half_is_widened_as_torch_does(library):
    halves = np.arange(65536, dtype=np.uint16)
    widened = np.empty((2, 65536), np.float32)
    library.widen_halves(pointer(halves), pointer(widened[0]), pointer(widened[1]), 65536)
    bits = torch.from_numpy(halves)
    for ours, dtype in zip(widened, (torch.float16, torch.bfloat16), strict=True):
        np.testing.assert_array_equal(ours, bits.view(dtype).float().numpy())


def test_floats_are_rounded_to_halves_as_torch_does(library):
    # Random bits: as they are, a tie between two halves, or one bit more or less than a tie.
    bits = np.random.default_rng(0).integers(2**32, size=1_000_000, dtype=np.uint32)
    near = [bits]
    for dropped in (13, 16):
        tie = bits >> dropped << dropped | 1 << (dropped - 1)
        near += [tie - 1, tie, tie + 1]
    # Those of float16's range, its subnormals included, are few among random floats.
    near += [(some & 0x8FFFFFFF) + 0x30000000 for some in near]
    floats = np.concatenate(near).astype(np.uint32).view(np.float32)
    floats = floats[~np.isnan(floats)]
    rounded = np.empty((2, len(floats)), np.uint16)
    library.round_halves(pointer(floats), pointer(rounded[0]), pointer(rounded[1]), len(floats))
    for ours, dtype in zip(rounded, (torch.float16, torch.bfloat16), strict=True):
        truth = torch.from_numpy(floats).to(dtype).view(torch.uint16).numpy()
        np.testing.assert_array_equal(ours, truth)
