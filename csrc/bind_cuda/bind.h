// What the bindings of the CUDA kernels share: reading tensors, checking what could touch foreign
// memory, device and stream. Torch's stable ABI: one library serves many versions.
//
// With FASTVLM_EMULATOR the same bindings serve CPU tensors through kernels that g++ compiled, and
// tell the emulator which memory a launch was given.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/kernels.h"

#if defined(FASTVLM_EMULATOR)
#include "emulator/emulator.h"
#define FASTVLM_DEVICE CPU
// Of the library that was loaded last: tests load kernels with planted faults over the true ones.
#define FASTVLM_CUDA_KERNEL(name) \
  reinterpret_cast<decltype(&fastvlm_cuda_##name)>(emulator_kernel("fastvlm_cuda_" #name))
extern "C" void* emulator_kernel(const char* name);
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTVLM_DEVICE CUDA
#define FASTVLM_CUDA_KERNEL(name) (&fastvlm_cuda_##name)
#endif

#define FASTVLM_IMPL_FOR(device) STABLE_TORCH_LIBRARY_IMPL(fastvlm_cuda, device, m)
#define FASTVLM_IMPL FASTVLM_IMPL_FOR(FASTVLM_DEVICE)

namespace fastvlm {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Stands at the head of an op: its launches go to the device of x and to PyTorch's stream there.
class Call {
 public:
#if defined(FASTVLM_EMULATOR)
  explicit Call(const Tensor&) { emulator::forget_memory(); }
  void* stream() const { return nullptr; }
  std::optional<uint64_t> stream_id(uint64_t) const { return 0; }
  int32_t device() const { return 0; }
  uint64_t capture() const { return 0; }
  bool when_the_graph_is_gone(void*, void (*)(void*)) const { return false; }
#else
  explicit Call(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
    device_of_this_call = index_;
  }
  void* stream() const { return stream_; }
  // No other stream ever has it, though its handle may come again. CUDA does not tell it in a
  // capture, in which the handle does as well; nothing where one handle is a stream of each thread,
  // or where CUDA refuses to tell.
  std::optional<uint64_t> stream_id(uint64_t capture) const {
    if (stream_ == cudaStreamPerThread) return std::nullopt;
    if (capture != 0) return reinterpret_cast<uintptr_t>(stream_);
    unsigned long long id = 0;
    if (cudaStreamGetId(static_cast<cudaStream_t>(stream_), &id) == cudaSuccess) return id;
    (void)cudaGetLastError();  // nobody else is to find it
    return std::nullopt;
  }
  int32_t device() const { return index_; }
  // Of the graph that the stream is captured into; 0 where it is not captured.
  uint64_t capture() const { return captured(nullptr); }
  // Lets destroy(kept) be called when the graph that is being captured, and all that was made of
  // it, are destroyed and done; false where CUDA refuses that.
  bool when_the_graph_is_gone(void* kept, void (*destroy)(void*)) const {
    cudaGraph_t graph = nullptr;
    if (captured(&graph) == 0) return false;
    cudaUserObject_t object = nullptr;
    if (cudaUserObjectCreate(&object, kept, destroy, 1, cudaUserObjectNoDestructorSync) !=
        cudaSuccess) {
      return false;
    }
    check(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
    return true;
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "fastvlm: ", cudaGetErrorString(error));
  }
  uint64_t captured(cudaGraph_t* graph) const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream_), &status, &id, graph));
    return status == cudaStreamCaptureStatusNone ? 0 : id;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;

 public:
  static inline thread_local int32_t device_of_this_call = -1;
#endif
};

inline bool on_device(const Tensor& t) {
#if defined(FASTVLM_EMULATOR)
  return t.is_cpu();
#else
  return t.is_cuda() && t.get_device_index() == Call::device_of_this_call;
#endif
}

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Char: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Long: return 8;
    default: return 4;
  }
}

enum class Access { kInput, kResult, kCounters };

// Lets the launches of this call touch t.
inline void give(const Tensor& t, const char* name, Access access) {
#if defined(FASTVLM_EMULATOR)
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  if (t.numel() > 0) {
    emulator::give_memory(name, t.const_data_ptr(), (last + 1) * bytes_of(t.scalar_type()),
                          static_cast<emulator::Access>(access));
  }
#else
  (void)t, (void)name, (void)access;
#endif
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::Char: return DType::kInt8;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or int8");
  }
}

inline const void* input(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(on_device(t), name, ": expected a CUDA tensor on the device of the others");
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(dims == 0 || t.numel() == 0 || t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1,
                  name, ": the last dimension must be contiguous");
  give(t, name, Access::kInput);
  return t.const_data_ptr();
}

inline Rows rows_of(const Tensor& t, const char* name, DType dtype, int64_t rows, int64_t cols) {
  const void* data = input(t, name, 2);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": expected another dtype");
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == cols, name, ": expected ", rows, " x ", cols);
  return {data, t.stride(0)};
}

// Rows that begin at multiples of 16 bytes, and are divided by 16 bytes: what is read in those.
inline Rows short_rows(const Tensor& t, const char* name, DType dtype, int64_t rows, int64_t cols) {
  const Rows made = rows_of(t, name, dtype, rows, cols);
  const int64_t size = bytes_of(t.scalar_type());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(made.data) % 16 == 0 && cols * size % 16 == 0 &&
                      (rows <= 1 || made.stride * size % 16 == 0),
                  name, ": rows must begin at multiples of 16 bytes and be divided by them");
  return made;
}

// A vector of float32 or of `dtype`.
inline Vector vector_of(const Tensor& t, const char* name, DType dtype, int64_t size) {
  const void* data = input(t, name, 1);
  const DType own = dtype_of(t, name);
  STD_TORCH_CHECK(own == DType::kFloat || own == dtype, name, ": expected float32 or x's dtype");
  STD_TORCH_CHECK(t.size(0) == size, name, ": expected ", size, " elements, got ", t.size(0));
  return {data, own};
}

inline const int32_t* indices(const Tensor& t, const char* name, int64_t dims) {
  const void* data = input(t, name, dims);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, ": expected int32");
  STD_TORCH_CHECK(dims > 1 || t.is_contiguous(), name, ": must be contiguous");
  return static_cast<const int32_t*>(data);
}

// A new result, or an empty tensor where nobody wants it; *to stays null then.
template <class T>
inline Tensor result(const Tensor& like, const char* name, bool wanted,
                     std::initializer_list<int64_t> shape, ScalarType type, T** to) {
  const std::vector<int64_t> sizes = wanted ? std::vector<int64_t>(shape) : std::vector<int64_t>{0};
  Tensor made = torch::stable::new_empty(like, sizes, type);
  if (wanted) {
    give(made, name, Access::kResult);
    *to = static_cast<T*>(made.mutable_data_ptr());
  }
  return made;
}

// The counter's 53 bits are a fraction of 2^53: it is below p where they are below ceil(p 2^53).
inline Dropout dropout_of(const Optional& seed, double p) {
  if (!seed.has_value() || p <= 0.0) return {};
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: expected one int64");
  STD_TORCH_CHECK(p < 1.0, "dropout_p: expected a number in [0, 1), got ", p);
  STD_TORCH_CHECK(on_device(*seed), "seed: expected a CUDA tensor on the device of the others");
  give(*seed, "seed", Access::kInput);
  return {static_cast<const int64_t*>(seed->const_data_ptr()),
          static_cast<uint64_t>(std::ceil(std::ldexp(p, 53))), static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace cuda
}  // namespace fastvlm
