// The functions for x86 processors with AVX2, FMA, F16C and BMI: those that the compiler does not
// vectorise by itself are written out.
#include "table.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#include "loops.h"

#define COMMKIT_TARGET __attribute__((target("avx2,fma,f16c,bmi,popcnt")))

namespace {

#include "entries.inc"

COMMKIT_TARGET inline uint8_t sign_byte(__m256 x) {
  return static_cast<uint8_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ)));
}

COMMKIT_TARGET inline __m256 magnitude(__m256 x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

COMMKIT_TARGET inline bool is_aligned(const void *x) {
  return reinterpret_cast<uintptr_t>(x) % 32 == 0;
}

COMMKIT_TARGET inline void put(float *to, __m256 x, bool stream) {
  if (stream)
    _mm256_stream_ps(to, x);
  else
    _mm256_storeu_ps(to, x);
}

COMMKIT_TARGET void pack_signs(const float *x, int64_t n, uint8_t *bits) {
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8)
    bits[i / 8] = sign_byte(_mm256_loadu_ps(x + i));
  loops::pack_signs(x + whole, n - whole, bits + whole / 8);
}

// The lanes of loops::encode_signs.
struct Sizes {
  __m256d sums[4];

  // Eight elements: the first or the second half of the lanes.
  COMMKIT_TARGET void add(__m256 x, int half) {
    const __m256 size = magnitude(x);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(size));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(size, 1));
    sums[2 * half] = _mm256_add_pd(sums[2 * half], low);
    sums[2 * half + 1] = _mm256_add_pd(sums[2 * half + 1], high);
  }

  // With the n elements of x from `whole` on.
  COMMKIT_TARGET double finish(const float *x, int64_t whole, int64_t n) const {
    double lanes[loops::kLanes];
    for (int q = 0; q < 4; ++q)
      _mm256_storeu_pd(lanes + 4 * q, sums[q]);
    return loops::finish_l1(lanes, x, whole, n);
  }
};

COMMKIT_TARGET double encode_signs(const float *x, int64_t n, uint8_t *bits) {
  Sizes sizes = {};
  const int64_t whole = n - n % loops::kLanes;
  for (int64_t i = 0; i < whole; i += loops::kLanes)
    for (int half = 0; half < 2; ++half) {
      const __m256 v = _mm256_loadu_ps(x + i + 8 * half);
      bits[i / 8 + half] = sign_byte(v);
      sizes.add(v, half);
    }
  loops::pack_signs(x + whole, n - whole, bits + whole / 8);
  return sizes.finish(x, whole, n);
}

COMMKIT_TARGET double compensate_and_encode(const float *residual, const float *g, float *sum,
                                            int64_t n, float decay, float sent, bool stream,
                                            uint8_t *bits) {
  stream = stream && is_aligned(sum);
  Sizes sizes = {};
  const __m256 share = _mm256_set1_ps(decay), zero = _mm256_setzero_ps();
  const __m256 below = _mm256_set1_ps(sent), above = _mm256_set1_ps(-sent);
  const int64_t whole = n - n % loops::kLanes;
  for (int64_t i = 0; i < whole; i += loops::kLanes) {
    __builtin_prefetch(residual + i + kFetch);
    __builtin_prefetch(g + i + kFetch);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + 8 * half;
      const __m256 before = _mm256_loadu_ps(residual + at);
      const __m256 taken = _mm256_blendv_ps(below, above, _mm256_cmp_ps(before, zero, _CMP_GE_OQ));
      const __m256 left = _mm256_mul_ps(_mm256_add_ps(before, taken), share);
      const __m256 v = _mm256_add_ps(left, _mm256_loadu_ps(g + at)); // rounded thrice, as everywhere
      put(sum + at, v, stream);
      bits[at / 8] = sign_byte(v);
      sizes.add(v, half);
    }
  }
  for (int64_t i = whole; i < n; ++i)
    sum[i] = loops::compensated(residual[i], g[i], decay, sent);
  loops::pack_signs(sum + whole, n - whole, bits + whole / 8);
  return sizes.finish(sum, whole, n);
}

// Moves bit 8 j + k of a word to the sign of lane k.
COMMKIT_TARGET inline __m256i to_sign(__m256i word, int j) {
  const __m256i shifts =
      _mm256_sub_epi32(_mm256_set1_epi32(31 - 8 * j), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_sllv_epi32(word, shifts);
}

template <bool kAccumulate>
COMMKIT_TARGET void sum_signs_as(float *out, int64_t n, const uint8_t *const *bits,
                                 const float *scales, int rows, bool stream) {
  // Two words of each row at a time: to find the row costs as much as a word.
  const int64_t whole = n - n % 64;
  for (int64_t i = 0; i < whole; i += 64) {
    if (kAccumulate)
      loops::fetch_far<64>(out + i);
    const __m256 minus_zero = _mm256_set1_ps(-0.0f); // what changes nothing, not even a zero's sign
    __m256 sums[8];
    for (__m256 &sum : sums)
      sum = minus_zero;
    for (int r = 0; r < rows; ++r) {
      const __m256 plus = _mm256_set1_ps(scales[r]);
      const __m256 minus = _mm256_xor_ps(plus, minus_zero);
      __builtin_prefetch(bits[r] + i / 8 + kFetchBytes);
      for (int half = 0; half < 2; ++half) {
        int32_t four;
        __builtin_memcpy(&four, bits[r] + i / 8 + 4 * half, sizeof four);
        const __m256i word = _mm256_set1_epi32(four);
        for (int j = 0; j < 4; ++j) {
          const __m256 v = _mm256_blendv_ps(minus, plus, _mm256_castsi256_ps(to_sign(word, j)));
          sums[4 * half + j] = _mm256_add_ps(sums[4 * half + j], v);
        }
      }
    }
    for (int j = 0; j < 8; ++j) {
      float *to = out + i + 8 * j;
      put(to, kAccumulate ? _mm256_add_ps(_mm256_loadu_ps(to), sums[j]) : sums[j], stream);
    }
  }
  loops::sum_signs(out, whole, n, bits, scales, rows, kAccumulate);
}

COMMKIT_TARGET void sum_signs(float *out, int64_t n, const uint8_t *const *bits,
                              const float *scales, int rows, bool accumulate, bool stream) {
  stream = stream && is_aligned(out);
  if (accumulate)
    sum_signs_as<true>(out, n, bits, scales, rows, stream);
  else
    sum_signs_as<false>(out, n, bits, scales, rows, stream);
}

COMMKIT_TARGET uint32_t peak(const float *x, int64_t n) {
  __m256i tops[4] = {};
  const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
  const int64_t whole = n - n % 32;
  for (int64_t i = 0; i < whole; i += 32)
    for (int j = 0; j < 4; ++j) {
      const __m256i v = _mm256_castps_si256(_mm256_loadu_ps(x + i + 8 * j));
      tops[j] = _mm256_max_epi32(tops[j], _mm256_and_si256(v, mask));
    }
  const __m256i all =
      _mm256_max_epi32(_mm256_max_epi32(tops[0], tops[1]), _mm256_max_epi32(tops[2], tops[3]));
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4E));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xB1));
  const auto first = static_cast<uint32_t>(_mm_cvtsi128_si32(top));
  const uint32_t rest = whole < n ? loops::peak(x + whole, n - whole) : 0;
  return first > rest ? first : rest;
}

// Four registers of eight codes as bytes, within -top and top.
COMMKIT_TARGET inline void put_codes(const __m256i *c, __m256i top, bool stream, int8_t *codes) {
  // Packing works within halves of a register; this puts the four-byte groups back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bottom = _mm256_sub_epi8(_mm256_setzero_si256(), top);
  __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
  packed = _mm256_max_epi8(_mm256_min_epi8(packed, top), bottom);
  packed = _mm256_permutevar8x32_epi32(packed, order);
  if (stream)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(codes), packed);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes), packed);
}

COMMKIT_TARGET void round_nearest(const float *x, int64_t n, float inverse, float top, bool stream,
                                  int8_t *codes) {
  stream = stream && is_aligned(codes);
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i limit = _mm256_set1_epi8(static_cast<int8_t>(top));
  const int64_t whole = n - n % 32;
  for (int64_t i = 0; i < whole; i += 32) {
    loops::fetch_far<32>(x + i);
    __m256i c[4];
    for (int j = 0; j < 4; ++j) // half to even, as loops::nearest
      c[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
    put_codes(c, limit, stream, codes + i);
  }
  loops::round_nearest(x + whole, n - whole, inverse, top, codes + whole);
}

COMMKIT_TARGET void unpack_ternary(const uint8_t *packed, int64_t n, int8_t *codes) {
  const __m128i two_bits = _mm_set1_epi8(3), one = _mm_set1_epi8(1);
  const int64_t whole = n - n % 64;
  for (int64_t i = 0; i < whole; i += 64) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(packed + i / 4));
    __m128i c[4];
    for (int k = 0; k < 4; ++k) // the k-th code of every byte
      c[k] = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(x, 2 * k), two_bits), one);
    const __m128i halves[2][2] = {{_mm_unpacklo_epi8(c[0], c[1]), _mm_unpacklo_epi8(c[2], c[3])},
                                  {_mm_unpackhi_epi8(c[0], c[1]), _mm_unpackhi_epi8(c[2], c[3])}};
    for (int h = 0; h < 2; ++h) {
      auto *to = reinterpret_cast<__m128i *>(codes + i + 32 * h);
      _mm_storeu_si128(to, _mm_unpacklo_epi16(halves[h][0], halves[h][1]));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(halves[h][0], halves[h][1]));
    }
  }
  loops::unpack_ternary(packed + whole / 4, n - whole, codes + whole);
}

// What eight codes stand for, as loops::Whole and loops::Exponent have it.
struct Whole {
  COMMKIT_TARGET static inline __m256 values(__m256i codes) { return _mm256_cvtepi32_ps(codes); }
};
struct Exponent {
  COMMKIT_TARGET static inline __m256 values(__m256i codes) {
    const __m256i field = _mm256_add_epi32(codes, _mm256_set1_epi32(8));
    const __m256i size = _mm256_and_si256(field, _mm256_set1_epi32(7));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(size, _mm256_set1_epi32(120)), 23);
    const __m256i is_zero = _mm256_cmpeq_epi32(size, _mm256_setzero_si256());
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(field, 3), 31);
    return _mm256_castsi256_ps(_mm256_or_si256(sign, _mm256_andnot_si256(is_zero, power)));
  }
};

template <class Level, bool kExact, bool kAdd>
COMMKIT_TARGET inline void scale_by(const int8_t *codes, int64_t whole, float scale, float divisor,
                                    const float *before, bool stream, float *out) {
  const __m256 size = _mm256_set1_ps(scale), by = _mm256_set1_ps(kExact ? 1 / divisor : divisor);
  for (int64_t i = 0; i < whole; i += 32) {
    __m256 x[4];
    for (int j = 0; j < 4; ++j) {
      const auto *eight = reinterpret_cast<const __m128i *>(codes + i + 8 * j);
      x[j] = _mm256_mul_ps(Level::values(_mm256_cvtepi8_epi32(_mm_loadl_epi64(eight))), size);
      x[j] = kExact ? _mm256_mul_ps(x[j], by) : _mm256_div_ps(x[j], by);
      if (kAdd)
        x[j] = _mm256_add_ps(_mm256_loadu_ps(before + i + 8 * j), x[j]);
    }
    for (int j = 0; j < 4; ++j)
      put(out + i + 8 * j, x[j], stream);
  }
}

template <class Level, class Rest>
COMMKIT_TARGET inline void scale_as(const int8_t *codes, int64_t n, float scale, float divisor,
                                    const float *before, bool stream, float *out) {
  const int64_t whole = n - n % 32;
  stream = stream && is_aligned(out);
  if (loops::is_power_of_two(divisor) && before)
    scale_by<Level, true, true>(codes, whole, scale, divisor, before, stream, out);
  else if (loops::is_power_of_two(divisor))
    scale_by<Level, true, false>(codes, whole, scale, divisor, before, stream, out);
  else if (before)
    scale_by<Level, false, true>(codes, whole, scale, divisor, before, stream, out);
  else
    scale_by<Level, false, false>(codes, whole, scale, divisor, before, stream, out);
  loops::scale<Rest>(codes + whole, n - whole, scale, divisor, before ? before + whole : nullptr,
                     out + whole);
}

COMMKIT_TARGET void scale_codes(const int8_t *codes, int64_t n, float scale, float divisor,
                                const float *before, bool stream, float *out) {
  scale_as<Whole, loops::Whole>(codes, n, scale, divisor, before, stream, out);
}

COMMKIT_TARGET void scale_levels(const int8_t *codes, int64_t n, float scale, float divisor,
                                 const float *before, bool stream, float *out) {
  scale_as<Exponent, loops::Exponent>(codes, n, scale, divisor, before, stream, out);
}

COMMKIT_TARGET inline __m256i xor_shifted(__m256i h, int by) {
  return _mm256_xor_si256(h, _mm256_srli_epi32(h, by));
}

// Eight consecutive hashes of loops::hash24, as floats; keyed: the indices plus the first key.
COMMKIT_TARGET inline __m256 hashed(__m256i keyed, __m256i second) {
  const __m256i m1 = _mm256_set1_epi32(0x7FEB352D);
  const __m256i m2 = _mm256_set1_epi32(static_cast<int32_t>(0x846CA68Bu));
  __m256i h = _mm256_mullo_epi32(xor_shifted(keyed, 16), m1);
  h = _mm256_mullo_epi32(xor_shifted(_mm256_add_epi32(h, second), 15), m2);
  // (h ^ h >> 16) >> 8
  return _mm256_cvtepi32_ps(_mm256_xor_si256(_mm256_srli_epi32(h, 8), _mm256_srli_epi32(h, 24)));
}

COMMKIT_TARGET inline __m256i first_eight(uint32_t at) {
  return _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(at)),
                          _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

COMMKIT_TARGET void round_randomly(const float *x, int64_t n, float inverse, float top,
                                   const uint32_t *keys, uint32_t first, bool stream,
                                   int8_t *codes) {
  stream = stream && is_aligned(codes);
  const __m256 factor = _mm256_set1_ps(inverse), unit = _mm256_set1_ps(0x1p-24f);
  const __m256i limit = _mm256_set1_epi8(static_cast<int8_t>(top));
  const __m256i second = _mm256_set1_epi32(static_cast<int32_t>(keys[1]));
  __m256i index = first_eight(first + keys[0]);
  const int64_t whole = n - n % 32;
  for (int64_t i = 0; i < whole; i += 32) {
    loops::fetch_far<32>(x + i);
    __m256i c[4];
    for (int j = 0; j < 4; ++j) {
      // The noise is an exact product, so that fusing it into the sum rounds nothing away.
      const __m256 y = _mm256_fmadd_ps(hashed(index, second), unit,
                                       _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
      index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
      c[j] = _mm256_cvtps_epi32(_mm256_floor_ps(y));
    }
    put_codes(c, limit, stream, codes + i);
  }
  loops::round_randomly(x + whole, n - whole, inverse, top, keys,
                        first + static_cast<uint32_t>(whole), codes + whole);
}

// A step of a search: past so many bounds where the one at their end is below y, or not above it.
template <int kCompare>
COMMKIT_TARGET inline __m256i past(__m256i place, __m256 bound, __m256 y, int step) {
  const __m256i hit = _mm256_castps_si256(_mm256_cmp_ps(bound, y, kCompare));
  return _mm256_add_epi32(place, _mm256_and_si256(hit, _mm256_set1_epi32(step)));
}

template <bool kRandom>
COMMKIT_TARGET void round_to_levels_as(const float *x, int64_t n, float divisor,
                                       const Codebook &book, const uint32_t *keys, uint32_t first,
                                       uint8_t *codes) {
  constexpr int kCompare = kRandom ? _CMP_LE_OQ : _CMP_LT_OQ;
  const float *b = book.bounds;
  // The bounds that the first three steps ask for.
  const __m256 pivots = _mm256_setr_ps(b[31], b[63], b[95], b[127], b[159], b[191], b[223], b[255]);
  const __m256 by = _mm256_set1_ps(divisor), unit = _mm256_set1_ps(0x1p-24f);
  const __m256i one = _mm256_set1_epi32(1), last = _mm256_set1_epi32(book.count - 2);
  const __m256i second = _mm256_set1_epi32(kRandom ? static_cast<int32_t>(keys[1]) : 0);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i index = first_eight(kRandom ? first + keys[0] : 0);
  const int64_t whole = n - n % 32;
  for (int64_t i = 0; i < whole; i += 32) {
    __m256i c[4];
    for (int j = 0; j < 4; ++j) {
      const __m256 y = _mm256_div_ps(_mm256_loadu_ps(x + i + 8 * j), by);
      __m256i place = past<kCompare>(_mm256_setzero_si256(), _mm256_set1_ps(b[127]), y, 128);
      __m256i pivot = _mm256_add_epi32(_mm256_srli_epi32(place, 5), one);
      place = past<kCompare>(place, _mm256_permutevar8x32_ps(pivots, pivot), y, 64);
      pivot = _mm256_srli_epi32(place, 5);
      place = past<kCompare>(place, _mm256_permutevar8x32_ps(pivots, pivot), y, 32);
      for (int step = 16; step; step /= 2)
        place = past<kCompare>(place, _mm256_i32gather_ps(b + step - 1, place, 4), y, step);
      if (kRandom) {
        place = _mm256_sub_epi32(place, one);
        place = _mm256_min_epi32(_mm256_max_epi32(place, _mm256_setzero_si256()), last);
        const __m256 lower = _mm256_i32gather_ps(book.levels, place, 4);
        const __m256 gap = _mm256_sub_ps(_mm256_i32gather_ps(book.levels + 1, place, 4), lower);
        const __m256 noise = _mm256_mul_ps(hashed(index, second), unit);
        index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
        place = past<_CMP_LT_OQ>(place, _mm256_mul_ps(noise, gap), _mm256_sub_ps(y, lower), 1);
      }
      c[j] = place;
    }
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(c[2], c[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + i),
                        _mm256_permutevar8x32_epi32(packed, order));
  }
  loops::round_to_levels(x + whole, n - whole, divisor, book, keys,
                         first + static_cast<uint32_t>(whole), codes + whole);
}

COMMKIT_TARGET void round_to_levels(const float *x, int64_t n, float divisor, const Codebook &book,
                                    const uint32_t *keys, uint32_t first, uint8_t *codes) {
  if (book.random)
    round_to_levels_as<true>(x, n, divisor, book, keys, first, codes);
  else
    round_to_levels_as<false>(x, n, divisor, book, keys, first, codes);
}

// take(index, k) for the k-th of the bits, and how many there are. Of a few it is called four times,
// the last with k beyond them and an index up to 64: guessing their number wrong would cost more.
template <class Take> inline int64_t each_bit(uint64_t bits, const Take &take) {
  const int64_t count = __builtin_popcountll(bits);
  const auto next = [&bits] {
    const int place = bits ? __builtin_ctzll(bits) : 64;
    bits &= bits - 1;
    return place;
  };
  for (int64_t k = 0; k < 4; ++k)
    take(next(), k);
  for (int64_t k = 4; k < count; ++k)
    take(next(), k);
  return count;
}

COMMKIT_TARGET int64_t select(const float *x, int64_t n, float threshold, int64_t first,
                              int64_t *out) {
  const __m256 limit = _mm256_set1_ps(threshold);
  const int64_t whole = n - n % 64;
  int64_t count = 0;
  for (int64_t i = 0; i < whole; i += 64) {
    uint64_t found = 0;
    for (int j = 0; j < 64; j += 8) {
      const __m256 size = magnitude(_mm256_loadu_ps(x + i + j));
      const int mask = _mm256_movemask_ps(_mm256_cmp_ps(size, limit, _CMP_NLT_UQ));
      found |= static_cast<uint64_t>(mask) << j;
    }
    count += each_bit(found, [=](int64_t index, int64_t k) { out[count + k] = first + i + index; });
  }
  return count + loops::select(x, whole, n, threshold, first, out + count);
}

// Eight elements from i on; rounded after every operation, as everywhere.
template <bool kVelocity, bool kUnsent, bool kNesterov>
COMMKIT_TARGET inline void correct(const float *g, const Correction &how, __m256 momentum,
                                   int64_t i, __m256 *u, __m256 *v) {
  const __m256 x = _mm256_loadu_ps(g + i);
  __m256 moved = x;
  if (kVelocity) {
    const __m256 before = _mm256_loadu_ps(how.velocity + i);
    moved = kNesterov ? _mm256_add_ps(before, x) : _mm256_add_ps(_mm256_mul_ps(before, momentum), x);
  }
  *u = moved = kNesterov ? _mm256_mul_ps(moved, momentum) : moved;
  if (kUnsent)
    moved = _mm256_add_ps(_mm256_loadu_ps(how.unsent + i), moved);
  *v = kNesterov ? _mm256_add_ps(moved, x) : moved;
}

template <bool kVelocity, bool kUnsent, bool kNesterov>
COMMKIT_TARGET void correct_all(const float *g, const Correction &how, int64_t n, bool stream,
                                float *u, float *v) {
  const __m256 momentum = _mm256_set1_ps(how.momentum);
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) {
    __m256 moved, total;
    correct<kVelocity, kUnsent, kNesterov>(g, how, momentum, i, &moved, &total);
    put(u + i, moved, stream);
    put(v + i, total, stream);
  }
  loops::correct_momentum(g + whole, how.from(whole), n - whole, u + whole, v + whole);
}

COMMKIT_TARGET void correct_momentum(const float *g, const Correction &how, int64_t n, bool stream,
                                     float *u, float *v) {
  stream = stream && is_aligned(u) && is_aligned(v);
  COMMKIT_BY_KIND(how, correct_all, g, how, n, stream, u, v);
}

template <bool kVelocity, bool kUnsent, bool kNesterov>
COMMKIT_TARGET int64_t correct_and_select_as(const float *g, const Correction &how, const Cut &cut,
                                             int64_t n, bool stream, float *u, float *v,
                                             int64_t first, int64_t *places, float *values) {
  const __m256 momentum = _mm256_set1_ps(how.momentum);
  const __m256 low = _mm256_set1_ps(cut.low), high = _mm256_set1_ps(cut.high);
  const __m256 masked = _mm256_castsi256_ps(_mm256_set1_epi32(cut.masking ? -1 : 0));
  const int64_t whole = n - n % 64;
  alignas(32) float each[64 + 1];
  each[64] = 0; // for an index beyond the bits
  int64_t count = 0;
  for (int64_t i = 0; i < whole; i += 64) {
    uint64_t found = 0;
    for (int j = 0; j < 64; j += 8) {
      __m256 moved, total;
      correct<kVelocity, kUnsent, kNesterov>(g, how, momentum, i + j, &moved, &total);
      const __m256 size = magnitude(total);
      const int mask = _mm256_movemask_ps(_mm256_cmp_ps(size, low, _CMP_NLT_UQ));
      found |= static_cast<uint64_t>(mask) << j;
      _mm256_store_ps(each + j, total);
      const __m256 certain = _mm256_cmp_ps(size, high, _CMP_NLT_UQ);
      put(u + i + j, _mm256_andnot_ps(_mm256_and_ps(certain, masked), moved), stream);
      put(v + i + j, _mm256_andnot_ps(certain, total), stream);
    }
    count += each_bit(found, [&](int64_t index, int64_t k) {
      places[count + k] = first + i + index;
      values[count + k] = each[index];
    });
  }
  return count + loops::correct_and_select(g + whole, how.from(whole), cut, n - whole, u + whole,
                                           v + whole, first + whole, places + count,
                                           values + count);
}

COMMKIT_TARGET int64_t correct_and_select(const float *g, const Correction &how, const Cut &cut,
                                          int64_t n, bool stream, float *u, float *v, int64_t first,
                                          int64_t *places, float *values) {
  stream = stream && is_aligned(u) && is_aligned(v);
  return COMMKIT_BY_KIND(how, correct_and_select_as, g, how, cut, n, stream, u, v, first, places,
                         values);
}

void drain() { _mm_sfence(); }

// Lines side by side use a row that is loaded once.
template <int kLines>
COMMKIT_TARGET inline void mix_lines(const float *shares, const int32_t *which, int64_t count,
                                     const float *rows, int64_t stride, float *out) {
  for (int64_t c = 0; c < stride; c += kColumns) {
    __m256 sums[kLines][kColumns / 8] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float *row = rows + which[i] * stride + c;
      for (int j = 0; j < kColumns / 8; ++j) {
        const __m256 x = _mm256_loadu_ps(row + 8 * j);
        for (int l = 0; l < kLines; ++l) // rounded twice, as everywhere
          sums[l][j] =
              _mm256_add_ps(sums[l][j], _mm256_mul_ps(_mm256_set1_ps(shares[l * count + i]), x));
      }
    }
    for (int l = 0; l < kLines; ++l)
      for (int j = 0; j < kColumns / 8; ++j)
        _mm256_storeu_ps(out + l * stride + c + 8 * j, sums[l][j]);
  }
}

COMMKIT_TARGET void mix_rows(const float *shares, int64_t lines, const int32_t *which,
                             int64_t count, const float *rows, int64_t stride, float *out) {
  int64_t l = 0;
  for (; l + 2 <= lines; l += 2)
    mix_lines<2>(shares + l * count, which, count, rows, stride, out + l * stride);
  if (l < lines)
    mix_lines<1>(shares + l * count, which, count, rows, stride, out + l * stride);
}

COMMKIT_TARGET void widen_float16(const uint16_t *x, int64_t n, float *out) {
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i))));
  loops::widen_float16(x + whole, n - whole, out + whole);
}

const Table kTable = {
    "avx2",
#include "functions.inc"
};

} // namespace

const commkit::Table *commkit::avx2_table() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                 __builtin_cpu_supports("popcnt")
             ? &kTable
             : nullptr;
}

#else

const commkit::Table *commkit::avx2_table() { return nullptr; }

#endif
