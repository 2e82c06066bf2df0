"""Refusals that are collected, and what they must not change."""

import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fedspa_kernels import (
    Compressed,
    compress,
    decompress,
    expand_mask,
    l0_average_compressed,
    smallest_mask,
    unpack_mask,
    wanda_prune,
    wanda_scores,
)
from fedspa_kernels.checks import about, refuse, together

OPERATORS = (
    "smallest_mask", "wanda_prune", "wanda_scores", "expand_mask", "compress", "decompress",
    "unpack_mask", "l0_average_compressed",
)  # fmt: skip
WEIGHT = torch.arange(1.0, 25.0).view(3, 8)
NORMS = torch.ones(8)
MASK = WEIGHT % 3 != 0  # keeps 16
BITS = torch.tensor([[255], [255], [1]], dtype=torch.uint8)  # 17 weights
NAN = WEIGHT.masked_fill(~MASK, torch.nan)


def refused(message):
    """An explanation that raises."""

    def explain():
        raise ValueError(message)

    return explain


def test_a_flag_is_read_at_once_without_a_block():
    assert refuse(torch.tensor([0], dtype=torch.int32), refused("never"))
    assert refuse(torch.tensor([False, False]), refused("never"))
    with pytest.raises(ValueError, match="^now$"):
        refuse(torch.tensor([False, True]), refused("now"))


def test_a_block_raises_at_its_end_what_was_refused_first():
    reached = False
    with pytest.raises(ValueError, match="^first$"):  # noqa: PT012
        with together():
            assert not refuse(torch.zeros(1, dtype=torch.int32), refused("never"))
            refuse(torch.tensor([[0, 3]]), refused("first"))
            refuse(torch.tensor(True), refused("second"))
            reached = True
    assert reached


def test_nothing_is_collected_after_a_block():
    with together():
        pass
    with pytest.raises(ValueError, match="^now$"):
        refuse(torch.tensor(True), refused("now"))


def test_an_exception_of_the_block_goes_on_as_it_is():
    with pytest.raises(KeyError, match="mine"), together():
        refuse(torch.tensor(True), refused("refused"))
        raise KeyError("mine")
    with pytest.raises(ValueError, match="^now$"):
        refuse(torch.tensor(True), refused("now"))


def test_an_inner_block_reads_its_own_at_its_end():
    seen = []
    with pytest.raises(ValueError, match="^inner$"), together():
        refuse(torch.tensor(True), refused("outer"))
        try:
            with together():
                refuse(torch.tensor(True), refused("inner"))
        except ValueError:
            seen.append("inner")
            raise
    assert seen == ["inner"]


def test_another_thread_does_not_collect_here():
    raised = []

    def elsewhere():
        with pytest.raises(ValueError, match="^there$"):
            refuse(torch.tensor(True), refused("there"))
        raised.append(True)

    with together():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert raised == [True]


def test_sentences_begin_with_what_they_are_about_at_once_and_later():
    with pytest.raises(ValueError, match="^model: layer b: wrong$"):  # noqa: PT012
        with about("model: "), together():
            for name in "abc":
                with about(f"layer {name}: "):
                    refuse(torch.tensor(name == "b"), refused("wrong"))
    with pytest.raises(ValueError, match="^layer a: wrong$"), about("layer a: "):
        refuse(torch.tensor(True), refused("wrong"))
    with pytest.raises(ValueError, match="^layer a: part b: own$"), together():
        with about("layer a: "), about("part b: "):
            raise ValueError("own")


def test_a_flag_that_nothing_explains_is_still_refused():
    with pytest.raises(ValueError, match="a value that is not there any more"), together():
        refuse(torch.tensor(True), lambda: None)


CALLS = {
    "smallest_mask: scores hold NaN": lambda p: smallest_mask(NAN, 2, backend=p),
    "wanda_prune: weight holds NaN": lambda p: wanda_prune(NAN, NORMS, sparsity=0.5, backend=p),
    r"wanda_scores: norms\[0\] is -1.0": lambda p: wanda_scores(WEIGHT, -NORMS, backend=p),
    "expand_mask: votes go from 0 to 2 with 1": lambda p: expand_mask(
        MASK.int() * 2, 1, sparsity=0.5, backend=p
    ),
    "expand_mask: votes go from 0 to 4294967296 with 1": lambda p: expand_mask(
        MASK.long() * 2**32, 1, sparsity=0.5, backend=p
    ),
    "unpack_mask: a bit beyond the width 7": lambda p: unpack_mask(BITS, 7, backend=p),
    "compress: kept is 15 and the mask keeps 16": lambda p: compress(
        WEIGHT, MASK, kept=15, backend=p
    ),
    "decompress: the bits keep 17 weights and there are 2": lambda p: decompress(
        Compressed(BITS, torch.ones(2)), (3, 8), backend=p
    ),
    "l0_average_compressed: the bits of client 1 keep 17": lambda p: l0_average_compressed(
        [Compressed(BITS, torch.ones(17)), Compressed(BITS, torch.ones(2))], (3, 8), backend=p
    ),
}


@pytest.mark.parametrize("sentence", CALLS)
def test_operators_refuse_in_a_block_what_they_refuse_at_once(place, sentence):
    if place.device != "cpu":
        pytest.skip("the calls are of CPU tensors")
    with pytest.raises(ValueError, match=f"^{sentence}"):
        CALLS[sentence](place.backend)
    with pytest.raises(ValueError, match=f"^layer: {sentence}"), together(), about("layer: "):
        CALLS[sentence](place.backend)


def test_results_in_a_block_are_the_same(place):
    weight, mask = WEIGHT.to(place.device), MASK.to(place.device)
    plain = compress(weight, mask, backend=place.backend)
    with together():
        collected = compress(weight, mask, kept=16, backend=place.backend)
        rebuilt = decompress(collected, (3, 8), backend=place.backend)
        average = l0_average_compressed([collected] * 2, (3, 8), backend=place.backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, collected, strict=True))
    assert torch.equal(rebuilt, weight * mask) and torch.equal(average.weight, weight * mask)


def waits(call) -> int:
    """How often a call reads one number, or takes a shape from data: a GPU is waited for then."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
    return sum(event.count for event in profiled.key_averages() if event.key in names)


def test_kernels_do_not_wait_in_a_block(place):
    if place.backend == "reference":
        pytest.skip("the reference checks its values first")
    weight, mask, norms = (x.to(place.device) for x in (WEIGHT, MASK, NORMS))

    def prune_and_pack():
        with together():
            wanda_prune(weight, norms, sparsity=0.5, backend=place.backend)
            scores = wanda_scores(weight, norms, backend=place.backend)
            smallest_mask(scores, 3, backend=place.backend)
            expand_mask(mask.int(), 1, sparsity=0.5, backend=place.backend)
            collected = compress(weight, mask, kept=16, backend=place.backend)
            decompress(collected, (3, 8), backend=place.backend)
            l0_average_compressed([collected] * 2, (3, 8), backend=place.backend)

    assert waits(prune_and_pack) == 0
    assert waits(lambda: smallest_mask(weight, 3, backend=place.backend)) == 1


def test_checks_go_on_after_blocks_that_ended_out_of_order():
    def block():
        with together():
            yield

    first, second = block(), block()
    next(first), next(second)
    list(first), list(second)
    with pytest.raises(ValueError, match="NaN"):
        smallest_mask(torch.tensor([[torch.nan, 1.0]]), 1)
