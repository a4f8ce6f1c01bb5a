// The CPU library: runs the kernels' tasks on torch's threads and chooses the copy of the kernels
// that fits the machine. The ops themselves are in bind_cpu/.
#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#if defined(FASTVLM_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bind_cpu/bind.h"

namespace fastvlm {

constexpr int64_t kCacheLine = 64;

// A worker's share of the tasks, on a cache line of its own.
struct alignas(kCacheLine) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

void run_tasks(int64_t tasks, TaskBody body, void* context) {
  const int64_t threads = std::min(tasks, workers());
  if (threads == 0) return;
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next.store(tasks * i / threads, std::memory_order_relaxed);
    shares[i].end = tasks * (i + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(worker + i) % threads];
        for (int64_t task; (task = share.next.fetch_add(1)) < share.end;) {
          body(context, task, worker);
        }
      }
    }
  });
}

int64_t workers() { return torch::stable::get_num_threads(); }

constexpr std::align_val_t kAlignment{kCacheLine};
void* allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), kAlignment); }
void release(void* memory) { ::operator delete(memory, kAlignment); }

namespace {

// Whether the CPU multiplies tiles of bfloat16, and Linux lets this process keep some.
bool amx() {
#if defined(FASTVLM_X86) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) {
    return false;
  }
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// The best the machine has; `wanted` (empty for any) names one of them.
Capability choose(std::string wanted) {
  for (char& c : wanted) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
#if defined(FASTVLM_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && (wanted.empty() || wanted == "AMX") && amx()) return Capability::kAMX;
  if (bf16 && (wanted.empty() || wanted == "AVX512_BF16")) return Capability::kAVX512BF16;
  if (avx512 && (wanted.empty() || wanted == "AVX512")) return Capability::kAVX512;
  if (avx2 && (wanted.empty() || wanted == "AVX2")) return Capability::kAVX2;
#endif
  STD_TORCH_CHECK(
      wanted.empty() || wanted == "DEFAULT",
      "FASTVLM_CPU_CAPABILITY must be one of DEFAULT, AVX2, AVX512, AVX512_BF16 and AMX "
      "that this CPU and this build have; got ",
      wanted);
  return Capability::kDefault;
}

std::string capability_name() {
  switch (capability()) {
    case Capability::kAMX: return "AMX";
    case Capability::kAVX512BF16: return "AVX512_BF16";
    case Capability::kAVX512: return "AVX512";
    case Capability::kAVX2: return "AVX2";
    default: return "DEFAULT";
  }
}

}  // namespace

Capability capability() {
  static const Capability chosen = [] {
    const char* wanted = std::getenv("FASTVLM_CPU_CAPABILITY");
    return choose(wanted == nullptr ? "" : wanted);
  }();
  return chosen;
}

bool has_bfloat16_products() { return capability() >= Capability::kAVX512BF16; }

bool has_tiles() { return capability() == Capability::kAMX; }

bool has_int8_quads() {
#if defined(FASTVLM_X86)
  return capability() >= Capability::kAVX512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace fastvlm

STABLE_TORCH_LIBRARY(fastvlm_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&fastvlm::capability_name));
}
