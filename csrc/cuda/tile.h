// How work is cut up. A warp takes a tile of 1024 consecutive elements as 8 quads of 4 per lane:
// quad u of lane l begins at 128 u + 4 l, so that a warp's loads and stores of 16 bytes lie side by
// side. Lane l also owns "word" l, the elements 32 l to 32 l + 31, where one bit stands for one.
#pragma once

#include "kernels.h"
#include "portable.h"

namespace commkit {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQuads = 8;
constexpr int kStep = 4 * kWarp; // from one quad of a lane to its next
constexpr int64_t kTile = kQuads * kStep;
constexpr int64_t kBlockTile = kWarps * kTile;

inline int64_t blocks_for(int64_t n) { return (n + kBlockTile - 1) / kBlockTile; }
inline int64_t blocks_of_threads(int64_t n) { return (n + kThreads - 1) / kThreads; }

GPU_INLINE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
GPU_INLINE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
GPU_INLINE int64_t block_id() { return static_cast<int64_t>(blockIdx.x); }
GPU_INLINE int64_t thread_id() { return block_id() * kThreads + threadIdx.x; }
GPU_INLINE int64_t tile_begin() { return block_id() * kBlockTile + warp_id() * kTile; }
GPU_INLINE int64_t quad_begin(int64_t tile, int u) { return tile + u * kStep + 4 * lane_id(); }

// Halves are moved as integers, and widened by loops.h: exactly, and without the vendors' headers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
GPU_INLINE float widen(float x) { return x; }
GPU_INLINE float widen(BFloat16 x) { return loops::float_of(static_cast<uint32_t>(x.bits) << 16); }
GPU_INLINE float widen(Float16 x) { return loops::widened(x.bits); }

template <class T, int kCount> struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <int kCount, class T> inline bool is_aligned(const T *p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kCount) == 0;
}

template <int kCount, class T> GPU_INLINE Vector<T, kCount> load(const T *from) {
  return *reinterpret_cast<const Vector<T, kCount> *>(from);
}
template <int kCount, class T> GPU_INLINE void store(T *to, const Vector<T, kCount> &x) {
  *reinterpret_cast<Vector<T, kCount> *>(to) = x;
}

// Four elements from i on, as far as they lie before n; beyond there are zeros.
template <bool kWhole, class T>
GPU_INLINE void load_quad(const T *x, int64_t i, int64_t n, float (&v)[4]) {
  if (kWhole) {
    const Vector<T, 4> quad = load<4>(x + i);
    for (int k = 0; k < 4; ++k)
      v[k] = widen(quad.at[k]);
  } else {
    for (int k = 0; k < 4; ++k)
      v[k] = i + k < n ? widen(x[i + k]) : 0.0f;
  }
}

template <bool kWhole>
GPU_INLINE void store_quad(float *out, int64_t i, int64_t n, const float (&v)[4]) {
  if (kWhole)
    store<4>(out + i, Vector<float, 4>{{v[0], v[1], v[2], v[3]}});
  else
    for (int k = 0; k < 4; ++k)
      if (i + k < n)
        out[i + k] = v[k];
}

using Tile = float[kQuads][4];

// kWhole: all of the tile lies before n, at an aligned address. Beyond n there are zeros.
template <bool kWhole, class T>
GPU_INLINE void load_tile(const T *x, int64_t n, int64_t tile, Tile &v) {
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    const int64_t i = quad_begin(tile, u);
    if (kWhole) {
      const Vector<T, 4> quad = load<4>(x + i);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        v[u][k] = widen(quad.at[k]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        v[u][k] = i + k < n ? widen(x[i + k]) : 0.0f;
    }
  }
}

// out = v, or out += v.
template <bool kWhole>
GPU_INLINE void store_tile(float *out, int64_t n, int64_t tile, const Tile &v, bool accumulate) {
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    const int64_t i = quad_begin(tile, u);
    if (kWhole) {
      Vector<float, 4> quad = {{v[u][0], v[u][1], v[u][2], v[u][3]}};
      if (accumulate) {
        const Vector<float, 4> old = load<4>(out + i);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          quad.at[k] = old.at[k] + v[u][k];
      }
      store<4>(out + i, quad);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + k < n)
          out[i + k] = accumulate ? out[i + k] + v[u][k] : v[u][k];
    }
  }
}

// From one flag per element, four in each nibble, to the lane's word.
GPU_INLINE uint32_t gather_word(const uint32_t (&nibbles)[kQuads]) {
  uint32_t mine = 0;
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    uint32_t word = nibbles[u] << (4 * (lane_id() % 8));
    word |= from_xor(word, 1);
    word |= from_xor(word, 2);
    word |= from_xor(word, 4); // now eight lanes have the same
    word = from_lane(word, 8 * (lane_id() % 4));
    mine = lane_id() / 4 == u ? word : mine;
  }
  return mine;
}

// The nibble of quad u, from every lane's word.
GPU_INLINE uint32_t spread_word(uint32_t mine, int u) {
  return from_lane(mine, 4 * u + lane_id() / 8) >> (4 * (lane_id() % 8)) & 15u;
}

// Bits in kBits-wide fields of consecutive bytes, the lowest first: those of this quad, or word.
template <int kBytes> GPU_INLINE void store_bytes(uint8_t *to, uint32_t bits, int64_t left) {
#pragma unroll
  for (int k = 0; k < kBytes; ++k)
    if (k < left)
      to[k] = static_cast<uint8_t>(bits >> (8 * k));
}
template <int kBytes> GPU_INLINE uint32_t load_bytes(const uint8_t *from, int64_t left) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kBytes; ++k)
    if (k < left)
      bits |= static_cast<uint32_t>(from[k]) << (8 * k);
  return bits;
}

template <class T> GPU_INLINE T warp_sum(T x) {
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2)
    x += from_xor(x, mask);
  return x;
}

// Sum of x over the threads before this one; `total` is that over all. Every thread of a block of
// kCount calls.
template <int kCount, class T> GPU_INLINE T block_scan(T x, T *total) {
  static_assert(kCount / kWarp <= kWarp, "one value per warp");
  __shared__ T sums[kCount / kWarp];
  T upto = x;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const T below = from_below(upto, by);
    upto += lane_id() >= by ? below : 0;
  }
  __syncthreads(); // of an earlier call, all is read
  if (lane_id() == kWarp - 1)
    sums[warp_id()] = upto;
  __syncthreads();
  T before = 0, all = 0;
  for (int w = 0; w < kCount / kWarp; ++w) {
    before += w < warp_id() ? sums[w] : 0;
    all += sums[w];
  }
  *total = all;
  return before + upto - x;
}

// Calls function(pointer) with a pointer to the dtype of x.
template <class Function> int with_dtype(const void *x, int dtype, const Function &function) {
  if (dtype == kFloat32)
    return function(static_cast<const float *>(x));
  if (dtype == kBFloat16)
    return function(static_cast<const BFloat16 *>(x));
  return function(static_cast<const Float16 *>(x));
}

struct Keys {
  uint32_t first, second;
};

} // namespace commkit
