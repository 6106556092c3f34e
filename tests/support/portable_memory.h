// What the drivers of the portable kernels read, and the memory they give them.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

constexpr std::size_t kGuard = 4096;
constexpr unsigned char kMark = 0xA5;

inline void read(std::FILE *file, void *to, std::size_t bytes) {
  if (std::fread(to, 1, bytes, file) != bytes)
    throw std::runtime_error("the input ends early");
}

// Memory at a multiple of 64 between two bands that nobody may write.
struct Guarded {
  std::size_t size;
  unsigned char *raw;
  explicit Guarded(std::size_t bytes) : size(bytes) {
    const std::size_t all = (bytes + 2 * kGuard + 63) / 64 * 64;
    raw = static_cast<unsigned char *>(std::aligned_alloc(64, all));
    std::memset(raw, kMark, all);
  }
  unsigned char *data() const { return raw + kGuard; }
  void check(const char *name) const {
    for (std::size_t i = 0; i < kGuard; ++i)
      if (raw[i] != kMark || raw[kGuard + size + i] != kMark)
        throw std::runtime_error(std::string("something wrote outside ") + name);
  }
};
