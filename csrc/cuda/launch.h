// Host side of every kernel: how it is launched, and its dtype made a type. Nothing of torch.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "gpu.h"
#include "kernels.h"

namespace fastvlm {
namespace cuda {

#if defined(__CUDACC__)

// Shared memory beyond what a block gets without asking, once for a kernel, a device and a thread.
inline cudaError_t ask_for_shared(const void* kernel, int bytes) {
  constexpr int kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  static thread_local std::map<std::pair<const void*, int>, int> granted;
  int& most = granted[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), dim3 grid, int threads, int shared,
            void* stream, const Parameters& parameters) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  cudaError_t error = ask_for_shared(function, shared);
  if (error == cudaSuccess) {
    // its own error: the last one may be of somebody who launched before
    error = cudaLaunchKernel(function, grid, dim3(threads), arguments, shared,
                             static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // nobody else is to find it
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  }
}

inline void give_counters(const char*, const uint32_t*, int64_t) {}

#else

// The emulator must know of memory that no tensor is.
inline void give_counters(const char* name, const uint32_t* counters, int64_t size) {
  emulator::give_memory(name, counters, 4 * size, emulator::Access::kCounters);
}

template <class Parameters>
struct Launched {
  void (*kernel)(Parameters);
  const Parameters* parameters;
  // The launcher's memory is none of the kernel's: not to be watched.
  __attribute__((no_sanitize_thread)) static void run(const void* launched) {
    const auto& self = *static_cast<const Launched*>(launched);
    self.kernel(*self.parameters);
  }
};

template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), dim3 grid, int threads, int shared, void*,
            const Parameters& parameters) {
  const Launched<Parameters> launched{kernel, &parameters};
  emulator::launch(name, grid, threads, shared, Launched<Parameters>::run, &launched,
                   {reinterpret_cast<const void*>(kernel), &parameters, sizeof parameters});
}

#endif

// Planted bugs are compiled one by one: FASTVLM_FEW leaves out what their checks do not call.
#if defined(FASTVLM_FEW)
constexpr bool kAll = false;
#else
constexpr bool kAll = true;
#endif

// The two that tensor cores multiply.
template <class Body>
void with_short_type(DType dtype, const Body& body) {
  if (dtype == DType::kBFloat16) return body(gpu::bf16{});
  if constexpr (kAll) {
    if (dtype == DType::kHalf) return body(gpu::half{});
  }
  throw std::runtime_error("no kernel for this dtype");
}

// body gets an element of the type: with_type(dtype, [&](auto type) { using T = decltype(type); })
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat) return body(float{});
  with_short_type(dtype, body);
}

}  // namespace cuda
}  // namespace fastvlm
