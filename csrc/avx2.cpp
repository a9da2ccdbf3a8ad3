// The functions for x86 processors with AVX2 and F16C: those that the compiler does not vectorise
// by itself are written out.
#include "table.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#include "loops.h"

#define COMMKIT_TARGET __attribute__((target("avx2,f16c")))

namespace {

#include "entries.inc"

COMMKIT_TARGET inline uint8_t sign_byte(__m256 x) {
  return static_cast<uint8_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ)));
}

COMMKIT_TARGET inline __m256 magnitude(__m256 x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

COMMKIT_TARGET void pack_signs(const float *x, int64_t n, uint8_t *bits) {
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8)
    bits[i / 8] = sign_byte(_mm256_loadu_ps(x + i));
  loops::pack_signs(x + whole, n - whole, bits + whole / 8);
}

COMMKIT_TARGET double encode_signs(const float *x, int64_t n, uint8_t *bits) {
  __m256d sums[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                     _mm256_setzero_pd()};
  const int64_t whole = n - n % loops::kLanes;
  for (int64_t i = 0; i < whole; i += loops::kLanes)
    for (int half = 0; half < 2; ++half) {
      const __m256 v = _mm256_loadu_ps(x + i + 8 * half);
      bits[i / 8 + half] = sign_byte(v);
      const __m256 size = magnitude(v);
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(size));
      const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(size, 1));
      sums[2 * half] = _mm256_add_pd(sums[2 * half], low);
      sums[2 * half + 1] = _mm256_add_pd(sums[2 * half + 1], high);
    }
  double lanes[loops::kLanes];
  for (int q = 0; q < 4; ++q)
    _mm256_storeu_pd(lanes + 4 * q, sums[q]);
  loops::pack_signs(x + whole, n - whole, bits + whole / 8);
  return loops::finish_l1(lanes, x, whole, n);
}

// Moves bit 8 j + k of a word to the sign of lane k.
COMMKIT_TARGET inline __m256i to_sign(__m256i word, int j) {
  const __m256i shifts =
      _mm256_sub_epi32(_mm256_set1_epi32(31 - 8 * j), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_sllv_epi32(word, shifts);
}

template <bool kAccumulate>
COMMKIT_TARGET void sum_signs_as(float *out, int64_t n, const uint8_t *const *bits,
                                 const float *scales, int rows) {
  const int64_t whole = n - n % 32;
  for (int64_t i = 0; i < whole; i += 32) {
    __m256 sums[4] = {};
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, bits[r] + i / 8, sizeof four);
      const __m256i word = _mm256_set1_epi32(four);
      const __m256 plus = _mm256_set1_ps(scales[r]);
      const __m256 minus = _mm256_set1_ps(-scales[r]);
      for (int j = 0; j < 4; ++j) {
        const __m256 v = _mm256_blendv_ps(minus, plus, _mm256_castsi256_ps(to_sign(word, j)));
        sums[j] = r == 0 ? v : _mm256_add_ps(sums[j], v);
      }
    }
    for (int j = 0; j < 4; ++j) {
      float *to = out + i + 8 * j;
      _mm256_storeu_ps(to, kAccumulate ? _mm256_add_ps(_mm256_loadu_ps(to), sums[j]) : sums[j]);
    }
  }
  loops::sum_signs(out, whole, n, bits, scales, rows, kAccumulate);
}

COMMKIT_TARGET void sum_signs(float *out, int64_t n, const uint8_t *const *bits,
                              const float *scales, int rows, bool accumulate) {
  if (accumulate)
    sum_signs_as<true>(out, n, bits, scales, rows);
  else
    sum_signs_as<false>(out, n, bits, scales, rows);
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
  uint32_t lanes[8], top = loops::peak(x + whole, n - whole);
  _mm256_storeu_si256(
      reinterpret_cast<__m256i *>(lanes),
      _mm256_max_epi32(_mm256_max_epi32(tops[0], tops[1]), _mm256_max_epi32(tops[2], tops[3])));
  for (const uint32_t lane : lanes)
    top = lane > top ? lane : top;
  return top;
}

// As loops::nearest(loops::clamped(...)): the processor's conversion rounds half to even.
COMMKIT_TARGET inline __m256i to_code(__m256 y, __m256 top) {
  y = _mm256_and_ps(y, _mm256_cmp_ps(y, y, _CMP_ORD_Q));
  y = _mm256_max_ps(_mm256_min_ps(y, top), _mm256_sub_ps(_mm256_setzero_ps(), top));
  return _mm256_cvtps_epi32(y);
}

COMMKIT_TARGET void round_nearest(const float *x, int64_t n, float inverse, float top,
                                  int8_t *codes) {
  const __m256 factor = _mm256_set1_ps(inverse), limit = _mm256_set1_ps(top);
  // Packing works within halves of a register; this puts the four-byte groups back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const int64_t whole = n - n % 32;
  for (int64_t i = 0; i < whole; i += 32) {
    __m256i c[4];
    for (int j = 0; j < 4; ++j)
      c[j] = to_code(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor), limit);
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + i),
                        _mm256_permutevar8x32_epi32(packed, order));
  }
  loops::round_nearest(x + whole, n - whole, inverse, top, codes + whole);
}

COMMKIT_TARGET int64_t select(const float *x, int64_t n, float threshold, int64_t first,
                              int64_t *out) {
  const __m256 limit = _mm256_set1_ps(threshold);
  const int64_t whole = n - n % 8;
  int64_t count = 0;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 size = magnitude(_mm256_loadu_ps(x + i));
    auto found = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(size, limit, _CMP_GE_OQ)));
    for (; found; found &= found - 1)
      out[count++] = first + i + __builtin_ctz(found);
  }
  return count + loops::select(x, whole, n, threshold, first, out + count);
}

COMMKIT_TARGET void widen_float16(const uint16_t *x, int64_t n, float *out) {
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i))));
  loops::widen_float16(x + whole, n - whole, out + whole);
}

const Table kTable = {"avx2",         pack_signs,     encode_signs,     sum_signs,
                      peak,           round_nearest,  round_randomly,   pack_nibbles,
                      unpack_nibbles, scale_codes,    add_scaled_codes, add,
                      noise,          ternarize,      pack_ternary,     unpack_ternary,
                      select,         widen_bfloat16, widen_float16};

} // namespace

const commkit::Table *commkit::avx2_table() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? &kTable : nullptr;
}

#else

const commkit::Table *commkit::avx2_table() { return nullptr; }

#endif
