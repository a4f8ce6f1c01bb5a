// Which compiled kernels a binding calls: those of the library that was loaded last.
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace {
std::vector<void*> libraries;
}

extern "C" {

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
