// Magnitudes as integers, and the one of a rank.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "loops.h"

namespace commkit {

using Order = std::vector<uint32_t>;

// The bits of a magnitude, which order as it does; every NaN is one and above all.
inline uint32_t order_of(float x) { return std::min(loops::bits_of(x) & 0x7FFFFFFFu, 0x7F800001u); }

// The rank-th largest; 1 <= rank <= size. Works in `order` and leaves it in disorder.
inline uint32_t ranked(Order &order, int64_t rank) {
  constexpr size_t kFew = 4096; // below, clearing the counters costs more than they bring
  constexpr int kBits = 11;
  for (const int shift : {20, 9, 0}) {
    if (order.size() <= kFew)
      break;
    int64_t counts[1 << kBits] = {};
    const auto digit = [shift](uint32_t key) { return (key >> shift) & ((1u << kBits) - 1); };
    for (const uint32_t key : order)
      ++counts[digit(key)];
    uint32_t bin = (1u << kBits) - 1;
    for (; rank > counts[bin]; --bin)
      rank -= counts[bin];
    size_t kept = 0;
    for (const uint32_t key : order) {
      order[kept] = key;
      kept += digit(key) == bin;
    }
    order.resize(kept);
  }
  const auto at = order.begin() + (rank - 1);
  std::nth_element(order.begin(), at, order.end(), std::greater<uint32_t>());
  return *at;
}

} // namespace commkit
