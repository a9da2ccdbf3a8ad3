// Loops in plain C++. Each instruction set compiles its own copy: they are inlined into functions
// that carry its target attribute, and vectorised there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "table.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define COMMKIT_INLINE static __host__ __device__ __forceinline__
#else
#define COMMKIT_INLINE static inline __attribute__((always_inline))
#endif

namespace commkit {
namespace loops {

COMMKIT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

COMMKIT_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// Asks for so many floats, whole lines of the cache.
template <int64_t kFloats> COMMKIT_INLINE void fetch_far(const float *x) {
  for (int64_t i = 0; i < kFloats; i += 16)
    __builtin_prefetch(x + kFetchFar + i);
}

COMMKIT_INLINE uint8_t sign_byte(const float *x, int64_t n) {
  unsigned byte = 0;
  for (int64_t k = 0; k < n; ++k)
    byte |= static_cast<unsigned>(x[k] >= 0) << k;
  return static_cast<uint8_t>(byte);
}

COMMKIT_INLINE void pack_signs(const float *x, int64_t n, uint8_t *bits) {
  for (int64_t i = 0; i < n; i += 8)
    bits[i / 8] = sign_byte(x + i, n - i < 8 ? n - i : 8);
}

constexpr int kLanes = 16;

// Lane k has the sum of |x[i]| over i = k modulo 16, up to `from`; adds the rest, then all lanes in
// order.
COMMKIT_INLINE double finish_l1(double *lanes, const float *x, int64_t from, int64_t n) {
  for (int64_t i = from; i < n; ++i)
    lanes[i % kLanes] += static_cast<double>(std::fabs(x[i]));
  double total = 0;
  for (int k = 0; k < kLanes; ++k)
    total += lanes[k];
  return total;
}

COMMKIT_INLINE double encode_signs(const float *x, int64_t n, uint8_t *bits) {
  double lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int k = 0; k < kLanes; ++k)
      lanes[k] += static_cast<double>(std::fabs(x[i + k]));
  pack_signs(x, n, bits);
  return finish_l1(lanes, x, whole, n);
}

// What is left of a residual, of which its sign times `sent` was taken, and g.
COMMKIT_INLINE float compensated(float residual, float g, float decay, float sent) {
  return (residual + (residual >= 0 ? -sent : sent)) * decay + g;
}

COMMKIT_INLINE double compensate_and_encode(const float *residual, const float *g, float *sum,
                                            int64_t n, float decay, float sent, uint8_t *bits) {
  for (int64_t i = 0; i < n; ++i)
    sum[i] = compensated(residual[i], g[i], decay, sent);
  return encode_signs(sum, n, bits);
}

COMMKIT_INLINE float signed_scale(const uint8_t *bits, int64_t i, float scale) {
  return (bits[i / 8] >> (i % 8)) & 1 ? scale : -scale;
}

COMMKIT_INLINE void sum_signs(float *out, int64_t from, int64_t n, const uint8_t *const *bits,
                              const float *scales, int rows, bool accumulate) {
  for (int64_t i = from; i < n; ++i) {
    float sum = signed_scale(bits[0], i, scales[0]);
    for (int r = 1; r < rows; ++r)
      sum += signed_scale(bits[r], i, scales[r]);
    out[i] = accumulate ? out[i] + sum : sum;
  }
}

COMMKIT_INLINE uint32_t peak(const float *x, int64_t n) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t size = static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFFu);
    top = size > top ? size : top;
  }
  return static_cast<uint32_t>(top);
}

COMMKIT_INLINE double sum_of_squares(const float *x, int64_t n) {
  double lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int k = 0; k < kLanes; ++k)
      lanes[k] += static_cast<double>(x[i + k]) * static_cast<double>(x[i + k]);
  for (int64_t i = whole; i < n; ++i)
    lanes[i - whole] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double total = 0;
  for (int k = 0; k < kLanes; ++k)
    total += lanes[k];
  return total;
}

// The hash of reference.uniform_noise, as the integer below 2^24.
COMMKIT_INLINE uint32_t hash24(uint32_t index, uint32_t first_key, uint32_t second_key) {
  uint32_t h = index + first_key;
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h += second_key;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  return h >> 8;
}

COMMKIT_INLINE float uniform(uint32_t index, uint32_t first_key, uint32_t second_key) {
  const int32_t whole = static_cast<int32_t>(hash24(index, first_key, second_key));
  return static_cast<float>(whole) * 0x1p-24f;
}

COMMKIT_INLINE void noise(const uint32_t *keys, uint32_t first, int64_t n, float *out) {
  const uint32_t k0 = keys[0], k1 = keys[1];
  for (int64_t i = 0; i < n; ++i)
    out[i] = uniform(first + static_cast<uint32_t>(i), k0, k1);
}

// To at most `top` either way, which is a whole number: rounding afterwards gives what clamping
// afterwards would. NaN becomes 0, as torch's conversion to int8 makes it.
COMMKIT_INLINE float clamped(float y, float top) {
  y = y > top ? top : y;
  y = y < -top ? -top : y;
  return y == y ? y : 0.0f;
}

// Half to even, for |y| < 2^22.
COMMKIT_INLINE float nearest(float y) {
  constexpr float kShift = 0x1.8p23f;
  return (y + kShift) - kShift;
}

COMMKIT_INLINE void round_nearest(const float *__restrict x, int64_t n, float inverse, float top,
                                  int8_t *__restrict codes) {
  for (int64_t i = 0; i < n; ++i) {
    const float y = nearest(clamped(x[i] * inverse, top));
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(y));
  }
}

COMMKIT_INLINE void round_randomly(const float *__restrict x, int64_t n, float inverse, float top,
                                   const uint32_t *keys, uint32_t first, int8_t *__restrict codes) {
  const uint32_t k0 = keys[0], k1 = keys[1];
  for (int64_t i = 0; i < n; ++i) {
    const float u = uniform(first + static_cast<uint32_t>(i), k0, k1);
    const float y = clamped(x[i] * inverse + u, top);
    // Down: conversion cuts towards zero.
    const auto cut = static_cast<int32_t>(y);
    codes[i] = static_cast<int8_t>(cut - (static_cast<float>(cut) > y));
  }
}

// Codes of reference.quantize_e3m0, less 8 so that pack_nibbles takes them. keys: null to round to
// nearest.
COMMKIT_INLINE void round_e3m0(const float *__restrict x, int64_t n, float divisor,
                               const uint32_t *keys, uint32_t first, int8_t *__restrict codes) {
  const uint32_t k0 = keys ? keys[0] : 0, k1 = keys ? keys[1] : 0;
  for (int64_t i = 0; i < n; ++i) {
    const float y = std::fabs(x[i]) / divisor;
    const uint32_t u = bits_of(y);
    const bool graded = y >= 0x1p-6f;
    // y = 2^(code - 7) (1 + p), or below the first level p / 64
    const float p = graded ? float_of((u & 0x7FFFFFu) | 0x3F800000u) - 1.0f : 64.0f * y;
    const float limit = keys ? uniform(first + static_cast<uint32_t>(i), k0, k1) : 0.5f;
    const int32_t code = (graded ? static_cast<int32_t>(u >> 23) - 120 : 0) + (p > limit);
    const int32_t sign = (x[i] < 0) & (code > 0) ? 8 : 0;
    codes[i] = static_cast<int8_t>(code + sign - 8);
  }
}

COMMKIT_INLINE void pack_nibbles(const int8_t *__restrict codes, int64_t n,
                                 uint8_t *__restrict packed) {
  for (int64_t j = 0; j < n / 2; ++j)
    packed[j] =
        static_cast<uint8_t>(((codes[2 * j] + 8) & 15) | ((codes[2 * j + 1] + 8) & 15) << 4);
  if (n % 2)
    packed[n / 2] = static_cast<uint8_t>((codes[n - 1] + 8) & 15);
}

COMMKIT_INLINE void unpack_nibbles(const uint8_t *__restrict packed, int64_t n,
                                   int8_t *__restrict codes) {
  for (int64_t j = 0; j < n / 2; ++j) {
    codes[2 * j] = static_cast<int8_t>((packed[j] & 15) - 8);
    codes[2 * j + 1] = static_cast<int8_t>((packed[j] >> 4) - 8);
  }
  if (n % 2)
    codes[n - 1] = static_cast<int8_t>((packed[n / 2] & 15) - 8);
}

// An integer that orders as floats do, with NaN beyond the infinities; its own inverse.
COMMKIT_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

COMMKIT_INLINE void extremes(const float *__restrict x, int64_t n, int32_t *low, int32_t *high) {
  int32_t bottom = *low, top = *high;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(static_cast<int32_t>(bits_of(x[i])));
    bottom = key < bottom ? key : bottom;
    top = key > top ? key : top;
  }
  *low = bottom;
  *high = top;
}

// How many of the first 255 bounds are below y, or with kEqual not above it.
template <bool kEqual> COMMKIT_INLINE int32_t bounds_below(const float *bounds, float y) {
  int32_t place = 0;
#pragma GCC unroll 8
  for (int32_t step = 128; step; step /= 2) {
    const float bound = bounds[place + step - 1];
    place += step & -static_cast<int32_t>(kEqual ? bound <= y : bound < y);
  }
  return place;
}

COMMKIT_INLINE void round_to_levels(const float *__restrict x, int64_t n, float divisor,
                                    const Codebook &book, const uint32_t *keys, uint32_t first,
                                    uint8_t *__restrict codes) {
  const float *bounds = book.bounds, *levels = book.levels;
  if (!book.random) {
    for (int64_t i = 0; i < n; ++i)
      codes[i] = static_cast<uint8_t>(bounds_below<false>(bounds, x[i] / divisor));
    return;
  }
  const uint32_t k0 = keys[0], k1 = keys[1];
  const int32_t last = book.count - 2;
  for (int64_t i = 0; i < n; ++i) {
    const float y = x[i] / divisor;
    int32_t below = bounds_below<true>(bounds, y) - 1;
    below = below < 0 ? 0 : below > last ? last : below;
    const float lower = levels[below], gap = levels[below + 1] - lower;
    const float noise = uniform(first + static_cast<uint32_t>(i), k0, k1);
    codes[i] = static_cast<uint8_t>(below + (noise * gap < y - lower));
  }
}

COMMKIT_INLINE void round_to_powers(const float *__restrict x, int64_t n, int32_t top,
                                    const uint32_t *keys, uint32_t first,
                                    uint8_t *__restrict codes) {
  const uint32_t k0 = keys[0], k1 = keys[1];
  for (int64_t i = 0; i < n; ++i) {
    const float size = std::fabs(x[i]);
    const bool denormal = size < 0x1p-126f;
    const auto u = static_cast<int32_t>(bits_of(denormal ? size * 0x1p64f : size));
    const int32_t depth = top - (u >> 23) + (denormal ? 64 : 0), fraction = u & 0x7FFFFF;
    const auto noise = static_cast<int32_t>(hash24(first + static_cast<uint32_t>(i), k0, k1));
    const int32_t above = 127 - depth + (noise < 2 * fraction);
    // The chance of the smallest power is the element over it: (2^23 + fraction) / 2^(24 + under).
    const int32_t under = depth < 127 ? 0 : depth > 151 ? 24 : depth - 127;
    const int32_t smallest = noise <= ((fraction + 0x7FFFFF) >> under);
    const int32_t code = depth <= 126 ? above : smallest;
    codes[i] = static_cast<uint8_t>((size > 0 ? code : 0) | (x[i] < 0 ? 128 : 0));
  }
}

COMMKIT_INLINE void look_up(const uint8_t *__restrict codes, int64_t n,
                            const float *__restrict levels, float scale, float *__restrict out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = levels[codes[i]] * scale;
}

// What a code stands for, in units of its scale.
struct Whole {
  COMMKIT_INLINE float value(int8_t code) { return static_cast<float>(code); }
};
struct Exponent {
  COMMKIT_INLINE float value(int8_t code) {
    const uint32_t field = static_cast<uint32_t>(static_cast<int32_t>(code) + 8);
    const uint32_t size = field & 7;
    return float_of((field >> 3) << 31 | (size ? (size + 120) << 23 : 0));
  }
};

// Of whole numbers. Multiplying by the reciprocal of one gives the bits of a division, sooner.
COMMKIT_INLINE bool is_power_of_two(float x) { return (bits_of(x) & 0x7FFFFFu) == 0; }

template <class Level, class Add>
COMMKIT_INLINE void scale_and(const int8_t *__restrict codes, int64_t n, float scale, float divisor,
                              const Add &add, float *out) {
  const float inverse = 1.0f / divisor;
  if (is_power_of_two(divisor))
    for (int64_t i = 0; i < n; ++i)
      out[i] = add(i, Level::value(codes[i]) * scale * inverse);
  else
    for (int64_t i = 0; i < n; ++i)
      out[i] = add(i, Level::value(codes[i]) * scale / divisor);
}

// Added to what is before: nothing if null, out itself, or apart from it.
template <class Level>
COMMKIT_INLINE void scale(const int8_t *codes, int64_t n, float scale, float divisor,
                          const float *before, float *out) {
  if (!before)
    scale_and<Level>(codes, n, scale, divisor, [](int64_t, float x) { return x; }, out);
  else if (before == out)
    scale_and<Level>(
        codes, n, scale, divisor, [out](int64_t i, float x) { return out[i] + x; }, out);
  else
    scale_and<Level>(
        codes, n, scale, divisor, [before](int64_t i, float x) { return before[i] + x; }, out);
}

COMMKIT_INLINE void add(const float *x, int64_t n, float *out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] += x[i];
}

COMMKIT_INLINE void ternarize(const float *__restrict x, int64_t n, float divisor,
                              const uint32_t *keys, uint32_t first, int8_t *__restrict codes) {
  const uint32_t k0 = keys[0], k1 = keys[1];
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = uniform(first + static_cast<uint32_t>(i), k0, k1) < std::fabs(x[i]) / divisor;
    const int sign = (x[i] > 0) - (x[i] < 0);
    codes[i] = static_cast<int8_t>(kept ? sign : 0);
  }
}

COMMKIT_INLINE void pack_ternary(const int8_t *__restrict codes, int64_t n,
                                 uint8_t *__restrict packed) {
  const int64_t whole = n / 4;
  for (int64_t j = 0; j < whole; ++j) {
    const int8_t *c = codes + 4 * j;
    packed[j] = static_cast<uint8_t>(((c[0] + 1) & 3) | ((c[1] + 1) & 3) << 2 |
                                     ((c[2] + 1) & 3) << 4 | ((c[3] + 1) & 3) << 6);
  }
  if (n % 4) {
    unsigned byte = 0;
    for (int64_t k = 0; k < n % 4; ++k)
      byte |= static_cast<unsigned>((codes[4 * whole + k] + 1) & 3) << (2 * k);
    packed[whole] = static_cast<uint8_t>(byte);
  }
}

COMMKIT_INLINE void unpack_ternary(const uint8_t *__restrict packed, int64_t n,
                                   int8_t *__restrict codes) {
  for (int64_t j = 0; j < n / 4; ++j)
    for (int k = 0; k < 4; ++k)
      codes[4 * j + k] = static_cast<int8_t>(((packed[j] >> (2 * k)) & 3) - 1);
  for (int64_t i = n - n % 4; i < n; ++i)
    codes[i] = static_cast<int8_t>(((packed[i / 4] >> (2 * (i % 4))) & 3) - 1);
}

COMMKIT_INLINE int64_t select(const float *x, int64_t from, int64_t n, float threshold,
                              int64_t first, int64_t *out) {
  int64_t count = 0;
  for (int64_t i = from; i < n; ++i)
    if (!(std::fabs(x[i]) < threshold))
      out[count++] = first + i;
  return count;
}

// tops[i % lanes] = max(itself, bits of |x[i]|); lanes is a multiple of 32.
COMMKIT_INLINE void lane_peaks(const float *__restrict x, int64_t n, int64_t lanes,
                               int32_t *__restrict tops) {
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t count = n - i < lanes ? n - i : lanes;
    for (int64_t k = 0; k < count; ++k) {
      const auto size = static_cast<int32_t>(bits_of(x[i + k]) & 0x7FFFFFFFu);
      tops[k] = size > tops[k] ? size : tops[k];
    }
  }
}

// u and v of element i; see reference.correct_momentum_.
template <bool kVelocity, bool kUnsent, bool kNesterov>
COMMKIT_INLINE void correct(const float *g, const float *velocity, const float *unsent,
                            float momentum, int64_t i, float *u, float *v) {
  float moved = kNesterov ? (kVelocity ? velocity[i] + g[i] : g[i]) * momentum
                          : (kVelocity ? velocity[i] * momentum + g[i] : g[i]);
  u[i] = moved;
  moved = kUnsent ? unsent[i] + moved : moved;
  v[i] = kNesterov ? moved + g[i] : moved;
}

// function<velocity, unsent, nesterov>(...) for what there is of them.
#define COMMKIT_BY_KIND(how, function, ...)                                                        \
  ((how).velocity ? (how).unsent ? (how).nesterov ? function<true, true, true>(__VA_ARGS__)        \
                                                  : function<true, true, false>(__VA_ARGS__)       \
                    : (how).nesterov ? function<true, false, true>(__VA_ARGS__)                    \
                                     : function<true, false, false>(__VA_ARGS__)                   \
   : (how).unsent ? (how).nesterov ? function<false, true, true>(__VA_ARGS__)                      \
                                   : function<false, true, false>(__VA_ARGS__)                     \
   : (how).nesterov ? function<false, false, true>(__VA_ARGS__)                                    \
                    : function<false, false, false>(__VA_ARGS__))

template <bool kVelocity, bool kUnsent, bool kNesterov>
COMMKIT_INLINE void correct_all(const float *__restrict g, const float *__restrict velocity,
                                const float *__restrict unsent, float momentum, int64_t n,
                                float *__restrict u, float *__restrict v) {
  for (int64_t i = 0; i < n; ++i)
    correct<kVelocity, kUnsent, kNesterov>(g, velocity, unsent, momentum, i, u, v);
}

COMMKIT_INLINE void correct_momentum(const float *g, const Correction &how, int64_t n, float *u,
                                     float *v) {
  COMMKIT_BY_KIND(how, correct_all, g, how.velocity, how.unsent, how.momentum, n, u, v);
}

template <bool kVelocity, bool kUnsent, bool kNesterov>
COMMKIT_INLINE int64_t correct_and_select_as(const float *g, const Correction &how,
                                             const Cut &cut, int64_t n, float *u, float *v,
                                             int64_t first, int64_t *places, float *values) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    correct<kVelocity, kUnsent, kNesterov>(g, how.velocity, how.unsent, how.momentum, i, u, v);
    const float x = v[i];
    if (std::fabs(x) < cut.low)
      continue;
    places[count] = first + i;
    values[count++] = x;
    if (!(std::fabs(x) < cut.high)) {
      v[i] = 0;
      u[i] = cut.masking ? 0 : u[i];
    }
  }
  return count;
}

COMMKIT_INLINE int64_t correct_and_select(const float *g, const Correction &how, const Cut &cut,
                                          int64_t n, float *u, float *v, int64_t first,
                                          int64_t *places, float *values) {
  return COMMKIT_BY_KIND(how, correct_and_select_as, g, how, cut, n, u, v, first, places, values);
}

COMMKIT_INLINE void frozen_adam(float *__restrict p, float *__restrict exp_avg,
                                const float *__restrict momentum,
                                const float *__restrict denominator, float keep, float size,
                                int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float m = momentum[i];
    exp_avg[i] = m;
    p[i] = p[i] * keep + -size * m / denominator[i];
  }
}

// Line l of out = shares[l count] rows[which[0]] + shares[l count + 1] rows[which[1]] + ..., added
// up in this order. Rows and lines have stride floats, a multiple of kColumns.
COMMKIT_INLINE void mix_rows(const float *shares, int64_t lines, const int32_t *which,
                             int64_t count, const float *__restrict rows, int64_t stride,
                             float *__restrict out) {
  for (int64_t l = 0; l < lines; ++l, shares += count, out += stride)
    for (int64_t c = 0; c < stride; c += kColumns) {
      float sums[kColumns] = {};
      for (int64_t i = 0; i < count; ++i) {
        const float *row = rows + which[i] * stride + c;
        for (int k = 0; k < kColumns; ++k)
          sums[k] += shares[i] * row[k];
      }
      std::memcpy(out + c, sums, sizeof sums);
    }
}

COMMKIT_INLINE void widen_bfloat16(const uint16_t *x, int64_t n, float *out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = float_of(static_cast<uint32_t>(x[i]) << 16);
}

COMMKIT_INLINE float widened(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7FFFu;
  if (rest >= 0x7C00u) // inf and NaN
    return float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // The exponent's bias is moved by a product, which is exact for denormals too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

COMMKIT_INLINE void widen_float16(const uint16_t *x, int64_t n, float *out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = widened(x[i]);
}

} // namespace loops
} // namespace commkit
