// The CUDA kernels, under the overloads of the operators that name their backend.
#include <torch/csrc/stable/library.h>

#include "pnorm.h"
#include "softmax.h"

#ifndef DENSREG_CUDA_KEY  // CPU in the tests' emulation
#define DENSREG_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(densreg, DENSREG_CUDA_KEY, m) {
  m.impl("softmax.cuda", TORCH_BOX(&densreg::cuda::softmax));
  m.impl("softmax_backward.cuda", TORCH_BOX(&densreg::cuda::softmax_backward));
  m.impl("softmax_double_backward.cuda", TORCH_BOX(&densreg::cuda::softmax_double_backward));
  m.impl("pnorm.cuda", TORCH_BOX(&densreg::cuda::pnorm));
  m.impl("pnorm_backward.cuda", TORCH_BOX(&densreg::cuda::pnorm_backward));
}
