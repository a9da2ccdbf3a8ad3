// Inputs of several dtypes, seen as float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "table.h"

namespace commkit {

// Elements of half precision are widened, a piece at a time, which is exact.
class Input {
public:
  Input(const void *x, int dtype, const Table &table) : x_(x), dtype_(dtype), table_(table) {}

  // The n <= buffer's floats from `begin` on, in place or in the buffer.
  const float *floats(int64_t begin, int64_t n, float *buffer) const {
    if (dtype_ == kFloat32)
      return static_cast<const float *>(x_) + begin;
    const uint16_t *half = static_cast<const uint16_t *>(x_) + begin;
    (dtype_ == kBFloat16 ? table_.widen_bfloat16 : table_.widen_float16)(half, n, buffer);
    return buffer;
  }

  // visit(floats, begin, count) over consecutive pieces of [begin, end), of kChunk but for the
  // last.
  template <class Visit> void each(int64_t begin, int64_t end, const Visit &visit) const {
    alignas(32) float buffer[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      visit(floats(i, n, buffer), i, n);
    }
  }

  float at(int64_t i) const {
    float buffer;
    return *floats(i, 1, &buffer);
  }

  void prefetch(int64_t i) const {
    __builtin_prefetch(static_cast<const char *>(x_) + i * (dtype_ == kFloat32 ? 4 : 2));
  }

private:
  const void *x_;
  int dtype_;
  const Table &table_;
};

} // namespace commkit
