// Which compiled kernels a binding calls: those of the library that was loaded last; and who else
// may run their launches.
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"

namespace {
std::vector<void*> libraries;

// symbol: of the kernel. Not 0 where there was a fault, which words then says.
using Elsewhere = int (*)(const char* symbol, const unsigned* grid, int threads, int shared_bytes,
                          const void* parameters, int bytes, char* words, int room);
Elsewhere elsewhere = nullptr;
}  // namespace

namespace emulator {

bool ran_elsewhere(const char* name, dim3 grid, int threads, int shared_bytes,
                   const Launch& launch) {
  if (elsewhere == nullptr) return false;
  Dl_info found;
  if (dladdr(launch.kernel, &found) == 0 || found.dli_saddr != launch.kernel) {
    throw std::runtime_error(std::string(name) + " has no symbol");
  }
  const unsigned size[3] = {grid.x, grid.y, grid.z};
  char words[512] = "";
  if (elsewhere(found.dli_sname, size, threads, shared_bytes, launch.parameters, launch.bytes,
                words, sizeof words) != 0) {
    throw std::runtime_error(std::string(name) + ", " + words);
  }
  return true;
}

}  // namespace emulator

extern "C" {

void emulator_run_elsewhere(Elsewhere by) { elsewhere = by; }

// A handle, or null; emulator_error() says why.
void* emulator_load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) libraries.push_back(library);
  return library;
}

const char* emulator_error() { return dlerror(); }

void emulator_unload(void* library) {
  libraries.erase(std::remove(libraries.begin(), libraries.end(), library), libraries.end());
  dlclose(library);
}

void* emulator_kernel(const char* name) {
  for (auto library = libraries.rbegin(); library != libraries.rend(); ++library) {
    if (void* found = dlsym(*library, name)) return found;
  }
  throw std::runtime_error(std::string("no library has ") + name);
}
}
