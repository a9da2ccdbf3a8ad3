// What gains from AVX-512 (F, BW, DQ, VL): the integer products of the noise, and sums of many rows
// of signs, whose bits are masks as they are. The rest is bound by memory and stays with AVX2.
#include "table.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#include "loops.h"

#if defined(__clang__)
#define COMMKIT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define COMMKIT_TARGET                                                                             \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

namespace {

using namespace commkit;

COMMKIT_TARGET inline __m512i xor_shifted(__m512i h, unsigned by) {
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, by));
}

COMMKIT_TARGET void round_randomly(const float *x, int64_t n, float inverse, float top,
                                   const uint32_t *keys, uint32_t first, int8_t *codes) {
  const __m512 factor = _mm512_set1_ps(inverse), unit = _mm512_set1_ps(0x1p-32f);
  const __m512i limit = _mm512_set1_epi8(static_cast<int8_t>(top));
  const __m512i bottom = _mm512_sub_epi8(_mm512_setzero_si512(), limit);
  const __m512i second = _mm512_set1_epi32(static_cast<int32_t>(keys[1]));
  const __m512i upper = _mm512_set1_epi32(-0x100);
  const __m512i m1 = _mm512_set1_epi32(0x7FEB352D);
  const __m512i m2 = _mm512_set1_epi32(static_cast<int32_t>(0x846CA68Bu));
  // Packing works within quarters of a register; this puts the four-byte groups back in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i index =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + keys[0])),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const int64_t whole = n - n % 64;
  for (int64_t i = 0; i < whole; i += 64) {
    __m512i c[4];
    for (int j = 0; j < 4; ++j) {
      __m512i h = _mm512_mullo_epi32(xor_shifted(index, 16), m1);
      index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
      h = _mm512_mullo_epi32(xor_shifted(_mm512_add_epi32(h, second), 15), m2);
      // (h ^ h >> 16) without its lower 8 bits
      h = _mm512_ternarylogic_epi32(h, _mm512_srli_epi32(h, 16), upper, 0x28);
      // The noise is an exact product, so that fusing it into the sum rounds nothing away.
      const __m512 y = _mm512_fmadd_ps(_mm512_cvtepu32_ps(h), unit,
                                       _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * j), factor));
      c[j] = _mm512_cvt_roundps_epi32(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    }
    __m512i packed =
        _mm512_packs_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3]));
    packed = _mm512_max_epi8(_mm512_min_epi8(packed, limit), bottom);
    _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, packed));
  }
  loops::round_randomly(x + whole, n - whole, inverse, top, keys,
                        first + static_cast<uint32_t>(whole), codes + whole);
}

COMMKIT_TARGET void round_e3m0(const float *x, int64_t n, float divisor, const uint32_t *keys,
                               uint32_t first, int8_t *codes) {
  if (keys)
    loops::round_e3m0(x, n, divisor, keys, first, codes);
  else
    loops::round_e3m0(x, n, divisor, nullptr, first, codes);
}

COMMKIT_TARGET void noise(const uint32_t *keys, uint32_t first, int64_t n, float *out) {
  loops::noise(keys, first, n, out);
}

COMMKIT_TARGET void ternarize(const float *x, int64_t n, float divisor, const uint32_t *keys,
                              uint32_t first, int8_t *codes) {
  loops::ternarize(x, n, divisor, keys, first, codes);
}

template <bool kAccumulate>
COMMKIT_TARGET void sum_signs_as(float *out, int64_t n, const uint8_t *const *bits,
                                 const float *scales, int rows, bool stream) {
  constexpr int kRegisters = 8;
  constexpr int64_t kWidth = 16 * kRegisters;
  const __m512 minus_zero = _mm512_set1_ps(-0.0f); // what changes nothing, not even a zero's sign
  const int64_t whole = n - n % kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    __m512 sums[kRegisters];
    for (__m512 &sum : sums)
      sum = minus_zero;
    for (int r = 0; r < rows; ++r) {
      const uint8_t *at = bits[r] + i / 8;
      const __m512 plus = _mm512_set1_ps(scales[r]), minus = _mm512_xor_ps(plus, minus_zero);
      for (int j = 0; j < kRegisters; ++j) {
        uint16_t mask;
        __builtin_memcpy(&mask, at + 2 * j, sizeof mask);
        sums[j] = _mm512_add_ps(sums[j], _mm512_mask_blend_ps(mask, minus, plus));
      }
    }
    for (int j = 0; j < kRegisters; ++j) {
      float *to = out + i + 16 * j;
      const __m512 x = kAccumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sums[j]) : sums[j];
      if (stream)
        _mm512_stream_ps(to, x);
      else
        _mm512_storeu_ps(to, x);
    }
  }
  loops::sum_signs(out, whole, n, bits, scales, rows, kAccumulate);
}

COMMKIT_TARGET void sum_signs(float *out, int64_t n, const uint8_t *const *bits,
                              const float *scales, int rows, bool accumulate, bool stream) {
  stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (accumulate)
    sum_signs_as<true>(out, n, bits, scales, rows, stream);
  else
    sum_signs_as<false>(out, n, bits, scales, rows, stream);
}

Table make(const Table &avx2) {
  Table t = avx2;
  t.name = "avx512";
  t.sum_signs = sum_signs;
  t.round_randomly = round_randomly;
  t.round_e3m0 = round_e3m0;
  t.noise = noise;
  t.ternarize = ternarize;
  return t;
}

} // namespace

const commkit::Table *commkit::avx512_table() {
  const Table *avx2 = avx2_table();
  if (!avx2 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return nullptr;
  static const Table table = make(*avx2);
  return &table;
}

#else

const commkit::Table *commkit::avx512_table() { return nullptr; }

#endif
