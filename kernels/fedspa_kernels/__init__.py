"""Operators for (federated) pruning of large language models, on PyTorch alone.

Every function here is also a registered PyTorch operator, `torch.ops.fedspa.<name>`.
"""

from fedspa_kernels.bitmask import compress, decompress, pack_mask, unpack_mask
from fedspa_kernels.expansion import expand_mask
from fedspa_kernels.hessian import accumulate_hessian_
from fedspa_kernels.l0 import L0Accumulator, l0_average, l0_average_compressed
from fedspa_kernels.obs import obs_prune, obs_prune_shared
from fedspa_kernels.results import Average, Compressed, Pruned
from fedspa_kernels.selection import smallest_mask
from fedspa_kernels.wanda import wanda_prune, wanda_scores

__all__ = [
    "Average",
    "Compressed",
    "L0Accumulator",
    "Pruned",
    "accumulate_hessian_",
    "compress",
    "decompress",
    "expand_mask",
    "l0_average",
    "l0_average_compressed",
    "obs_prune",
    "obs_prune_shared",
    "pack_mask",
    "smallest_mask",
    "unpack_mask",
    "wanda_prune",
    "wanda_scores",
]
