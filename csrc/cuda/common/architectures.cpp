// Which GPUs this library holds code for, as TORCH_CUDA_ARCH_LIST spells them; Python refuses all others by name.
#include <torch/csrc/stable/library.h>

#include <string>

namespace sparsek::cuda {
namespace {

std::string architectures() { return SPARSEK_ARCHITECTURES; }

}  // namespace
}  // namespace sparsek::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(xformers_sparsek, m) { m.def("cuda_architectures() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&sparsek::cuda::architectures));
}
