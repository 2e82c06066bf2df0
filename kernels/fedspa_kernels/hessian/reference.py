"""The Hessian's sum in PyTorch."""

from torch import Tensor


def accumulate_hessian_(hessian: Tensor, inputs: Tensor) -> None:
    """Add inputsᵀ·inputs, one matrix or one stack of matrices at a time."""
    if hessian.dim() > 3:
        for one_hessian, one_inputs in zip(hessian, inputs, strict=True):
            accumulate_hessian_(one_hessian, one_inputs)
        return
    inputs = inputs.to(hessian.dtype)
    add_product_ = hessian.addmm_ if hessian.dim() == 2 else hessian.baddbmm_
    add_product_(inputs.mT, inputs)
