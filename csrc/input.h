// Inputs of several dtypes, seen as float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "table.h"

namespace commkit {

// A range of the input; elements of half precision are widened, a chunk at a time, which is exact.
class Input {
public:
  Input(const void *x, int dtype, const Table &table) : x_(x), dtype_(dtype), table_(table) {}

  // visit(floats, begin, count) over consecutive pieces of [begin, end): at most `piece` elements,
  // or kChunk if they have to be widened. `piece` is a multiple of kChunk.
  template <class Visit>
  void each(int64_t begin, int64_t end, int64_t piece, const Visit &visit) const {
    alignas(32) float buffer[kChunk];
    const int64_t step = dtype_ == kFloat32 ? piece : kChunk;
    for (int64_t i = begin; i < end; i += step) {
      const int64_t n = std::min(step, end - i);
      if (dtype_ == kFloat32) {
        visit(static_cast<const float *>(x_) + i, i, n);
        continue;
      }
      const uint16_t *half = static_cast<const uint16_t *>(x_) + i;
      (dtype_ == kBFloat16 ? table_.widen_bfloat16 : table_.widen_float16)(half, n, buffer);
      visit(buffer, i, n);
    }
  }

private:
  const void *x_;
  int dtype_;
  const Table &table_;
};

} // namespace commkit
