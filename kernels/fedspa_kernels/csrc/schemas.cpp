// Every operator of torch.ops.fedspa_native that all devices have, once for all of them; cpu.cpp
// and cuda.cu beside each operator's door implement them. What they compute stands in the family's
// kernel.py.
//
// `stream` is the cudaStream_t to launch on, as an integer: torch 2.10's stable ABI does not give
// it. The CPU ignores it. `invalid` is an int32 of shape (1,), not 0 where a value is refused.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fedspa_native, m) {
  m.def("smallest_mask(Tensor scores, int k, int stream) -> (Tensor mask, Tensor invalid)");

  m.def("wanda_scores(Tensor weight, Tensor norms, int stream) -> (Tensor scores, Tensor invalid)");
  m.def(
      "wanda_prune(Tensor weight, Tensor norms, bool norms_of_rows, int of, int count, int stream)"
      " -> (Tensor pruned, Tensor mask, Tensor invalid)");

  m.def(
      "expand_mask(Tensor votes, Tensor? scores, int clients, int of, int count, int stream)"
      " -> (Tensor mask, Tensor invalid)");

  m.def(
      "l0_average(Tensor[] weights, Tensor[] masks, int stream) -> (Tensor average, Tensor votes)");
  m.def(
      "l0_average_compressed(Tensor[] bits, Tensor[] values, Tensor[] offsets, int n, int segment, "
      "int stream) -> (Tensor average, Tensor votes)");
  m.def(
      "l0_add_(Tensor(a!) total, Tensor(b!) votes, Tensor(c!)? kept, Tensor weight, Tensor? mask, "
      "float importance, int stream) -> ()");

  m.def("pack_mask(Tensor mask, int stream) -> Tensor");
  m.def("unpack_mask(Tensor bits, int n, int stream) -> Tensor");
  m.def("count_kept(Tensor bits, int n, int segment, int stream) -> Tensor");
  m.def(
      "compress_values(Tensor weight, Tensor bits, Tensor offsets, int kept, int segment, "
      "int stream) -> Tensor");
  m.def(
      "decompress_values(Tensor bits, Tensor values, Tensor offsets, int n, int segment, "
      "int stream) -> Tensor");

  m.def("mirror_upper_(Tensor(a!) hessian, int stream) -> ()");

  m.def(
      "obs_prune_block_(Tensor weight, Tensor? update, Tensor scale, Tensor dead, Tensor damp, "
      "Tensor inverse, int count, int keep, int of, Tensor(a!) pruned, Tensor(b!) kept, "
      "Tensor(c!) change, Tensor(d!) loss, Tensor(e!) invalid, int stream) -> ()");
}
