// The library of the CUDA kernels. The ops are in bind_cuda/, the kernels in cuda/.
#include "bind_cuda/bind.h"

STABLE_TORCH_LIBRARY(fastvlm_cuda, m) { (void)m; }
