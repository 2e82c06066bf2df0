"""Calibration statistics of SparseGPT: the sum of x·xᵀ over tokens."""

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.arguments import check_devices, check_floats
from fedspa_kernels.hessian import kernel, reference


def accumulate_hessian_(hessian: Tensor, inputs: Tensor, *, backend: str | None = None) -> Tensor:
    """Add calibration tokens to a Hessian, in place: hessian += inputsᵀ·inputs.

    A raw sum, without the 2/n of SparseGPT (Frantar & Alistarh 2023, section 3.2), so that the
    sums of batches, ranks and clients can be added. Both triangles are valid. Half inputs are
    multiplied in float32; as for any float32 product of PyTorch, TF32 is used on a GPU only if
    `torch.set_float32_matmul_precision` asked for it.

    hessian: (..., cols, cols) float32, symmetric, changed; or float64, the truth for tests
    inputs:  (..., tokens, cols) float32, float16 or bfloat16; float64 into a float64 hessian only;
             not in the memory of the hessian
    returns: hessian
    raises:  ValueError where shapes, dtypes or devices disagree
    """
    torch.ops.fedspa.accumulate_hessian_(hessian, inputs, backend=backend)
    return hessian


def _check(hessian: Tensor, inputs: Tensor) -> None:
    check_floats("accumulate_hessian_", inputs=inputs)
    check_devices("accumulate_hessian_", hessian=hessian, inputs=inputs)
    if inputs.dim() < 2 or hessian.shape != (
        *inputs.shape[:-2],
        inputs.shape[-1],
        inputs.shape[-1],
    ):
        raise ValueError(
            f"accumulate_hessian_: hessian is {tuple(hessian.shape)} and inputs are "
            f"{tuple(inputs.shape)}; pass (..., cols, cols) and (..., tokens, cols), "
            "with batches of sequences flattened into tokens"
        )
    if hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"accumulate_hessian_: hessian is {hessian.dtype}; sum in float32")
    if inputs.dtype == torch.float64 and hessian.dtype != torch.float64:
        raise ValueError(
            "accumulate_hessian_: inputs are float64 and hessian is float32; "
            "convert the inputs, or sum in a float64 hessian"
        )


def _body(hessian: Tensor, inputs: Tensor, *, backend: str | None = None) -> None:
    _check(hessian, inputs)
    dispatch.run("accumulate_hessian_", hessian.device, backend, hessian, inputs)


def _fake(hessian: Tensor, inputs: Tensor, *, backend: str | None = None) -> None:
    _check(hessian, inputs)


dispatch.define(
    "accumulate_hessian_(Tensor(a!) hessian, Tensor inputs, *, str? backend=None) -> ()",
    _body,
    _fake,
)
dispatch.add("accumulate_hessian_", "reference", reference.accumulate_hessian_)
dispatch.add_native("accumulate_hessian_", kernel.by_panels)
dispatch.add_triton("accumulate_hessian_", kernel.by_tiles, family="hessian")
