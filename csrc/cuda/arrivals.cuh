// Which of the blocks that share a piece of work ends last: it puts their parts together, so that a
// split costs no second launch. No block waits for another.
//
// A counter says it that is 0 before and after every launch. The counters are the library's own,
// zeros when it is loaded: nothing is allocated and nothing set to 0 for a call. Launches that may
// run at the same time need slots of their own (csrc/bind_cuda/slots.h).
#pragma once

#include "gpu.h"
#include "kernels.h"

namespace fastvlm {
namespace cuda {

// Of each file of kernels: a slot's counters in one are not those in another.
GPU_ZEROS(counters, kArrivalSlots* kArrivals);

GPU_FN uint32_t* arrivals_of(const Arrivals& arrivals) {
  return arrivals.own != nullptr ? arrivals.own : counters + arrivals.slot * kArrivals;
}

// Whether this block is the last of `splits` to have written its part of a piece of work. All
// threads of it then see the parts of all: one of them puts the fences, the barriers extend them to
// the others. last: in shared memory.
GPU_FN bool is_last(const Arrivals& arrivals, int64_t piece, int64_t splits, bool* last) {
  gpu::barrier();
  if (gpu::thread_index() == 0) {
    const uint32_t others = static_cast<uint32_t>(splits) - 1;
    gpu::fence();
    *last = gpu::count_up(arrivals_of(arrivals) + piece, others) == others;
    gpu::fence();
  }
  gpu::barrier();
  return *last;
}

}  // namespace cuda
}  // namespace fastvlm
