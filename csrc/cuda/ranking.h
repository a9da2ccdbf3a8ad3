// The rank-th largest of many magnitudes, exactly, by counting digits: a float's 31 bits without
// the sign order like integers. Each pass looks at those that share the digits found so far.
#pragma once

#include "tile.h"

namespace commkit {

constexpr int kDigits = 3;
constexpr int kBins = 2048;

GPU_INLINE int digit_bits(int pass) { return pass == 0 ? 11 : 10; }
GPU_INLINE int digit_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }

// NaN is above all, and every NaN is one.
GPU_INLINE uint32_t order_of(float x) { return min(loops::bits_of(x) & 0x7FFFFFFFu, 0x7F800001u); }

// The leading digits of the wanted element, and its rank among those that share them.
struct Found {
  uint32_t prefix;
  int64_t rank;
};

// Counts one element, if it shares the digits found.
GPU_INLINE void count_digit(uint32_t *counts, int pass, const Found &upto, uint32_t order) {
  const int shift = digit_shift(pass), bits = digit_bits(pass);
  if (order >> shift >> bits == upto.prefix)
    atomicAdd(counts + (order >> shift & ((1u << bits) - 1)), 1u);
}

// One more digit, from the counts of its kBins values. Every thread of a block of kThreads calls.
GPU_INLINE Found next_digit(const uint32_t *counts, int pass, const Found &upto) {
  __shared__ Found found;
  constexpr int kOwn = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn; // from the largest downwards
  int64_t own = 0, all;
  for (int k = 0; k < kOwn; ++k)
    own += counts[top - k];
  int64_t before = block_scan<kThreads>(own, &all);
  for (int k = 0; k < kOwn; ++k) {
    const int64_t count = counts[top - k];
    if (before < upto.rank && upto.rank <= before + count)
      found = {upto.prefix << digit_bits(pass) | static_cast<uint32_t>(top - k),
               upto.rank - before};
    before += count;
  }
  __syncthreads();
  const Found longer = found;
  __syncthreads();
  return longer;
}

} // namespace commkit
