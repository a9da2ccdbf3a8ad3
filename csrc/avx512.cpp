// What gains from AVX-512 (F, BW, DQ, VL): the integer products of the noise, signs, which are masks as
// they are, and sums of many rows of them. The rest is bound by memory and stays with AVX2.
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

COMMKIT_TARGET inline void put(float *to, __m512 x, bool stream) {
  if (stream)
    _mm512_stream_ps(to, x);
  else
    _mm512_storeu_ps(to, x);
}

inline bool is_aligned(const void *x) { return reinterpret_cast<uintptr_t>(x) % 64 == 0; }

COMMKIT_TARGET inline __m512i lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Sixteen signs, as loops::pack_signs has them.
COMMKIT_TARGET inline void put_signs(uint8_t *bits, __m512 x) {
  const uint16_t mask = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
  __builtin_memcpy(bits, &mask, sizeof mask);
}

// The lanes of loops::encode_signs.
struct Sizes {
  __m512d low, high;

  COMMKIT_TARGET void add(__m512 x) {
    const __m512 size = _mm512_abs_ps(x);
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(size)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(size, 1)));
  }

  // With the n elements of x from `whole` on.
  COMMKIT_TARGET double finish(const float *x, int64_t whole, int64_t n) const {
    double lanes[loops::kLanes];
    _mm512_storeu_pd(lanes, low);
    _mm512_storeu_pd(lanes + 8, high);
    return loops::finish_l1(lanes, x, whole, n);
  }
};

COMMKIT_TARGET double encode_signs(const float *x, int64_t n, uint8_t *bits) {
  Sizes sizes = {};
  const int64_t whole = n - n % loops::kLanes;
  for (int64_t i = 0; i < whole; i += loops::kLanes) {
    const __m512 v = _mm512_loadu_ps(x + i);
    put_signs(bits + i / 8, v);
    sizes.add(v);
  }
  loops::pack_signs(x + whole, n - whole, bits + whole / 8);
  return sizes.finish(x, whole, n);
}

COMMKIT_TARGET double compensate_and_encode(const float *residual, const float *g, float *sum,
                                            int64_t n, float decay, float sent, bool stream,
                                            uint8_t *bits) {
  stream = stream && is_aligned(sum);
  Sizes sizes = {};
  const __m512 share = _mm512_set1_ps(decay), zero = _mm512_setzero_ps();
  const __m512 below = _mm512_set1_ps(sent), above = _mm512_set1_ps(-sent);
  const int64_t whole = n - n % loops::kLanes;
  for (int64_t i = 0; i < whole; i += loops::kLanes) {
    __builtin_prefetch(residual + i + kFetch);
    __builtin_prefetch(g + i + kFetch);
    const __m512 before = _mm512_loadu_ps(residual + i);
    const __mmask16 positive = _mm512_cmp_ps_mask(before, zero, _CMP_GE_OQ);
    const __m512 taken = _mm512_mask_blend_ps(positive, below, above);
    const __m512 left = _mm512_mul_ps(_mm512_add_ps(before, taken), share);
    const __m512 v = _mm512_add_ps(left, _mm512_loadu_ps(g + i)); // rounded thrice, as everywhere
    put(sum + i, v, stream);
    put_signs(bits + i / 8, v);
    sizes.add(v);
  }
  for (int64_t i = whole; i < n; ++i)
    sum[i] = loops::compensated(residual[i], g[i], decay, sent);
  loops::pack_signs(sum + whole, n - whole, bits + whole / 8);
  return sizes.finish(sum, whole, n);
}

COMMKIT_TARGET inline __m512i xor_shifted(__m512i h, unsigned by) {
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, by));
}

COMMKIT_TARGET void round_randomly(const float *x, int64_t n, float inverse, float top,
                                   const uint32_t *keys, uint32_t first, bool stream,
                                   int8_t *codes) {
  stream = stream && is_aligned(codes);
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
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + keys[0])), lane_numbers());
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
    packed = _mm512_permutexvar_epi32(order, packed);
    if (stream)
      _mm512_stream_si512(reinterpret_cast<__m512i *>(codes + i), packed);
    else
      _mm512_storeu_si512(codes + i, packed);
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

// The sums of five rows for each of their signs, which are bits 0 to 4 of a place in the table.
class SumsOfFive {
public:
  static constexpr int kRows = 5;

  COMMKIT_TARGET explicit SumsOfFive(const float *scales) {
    constexpr __mmask16 kBits[] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00}; // of places 0 to 15
    const auto either = [scales, &kBits](int r) COMMKIT_TARGET {
      return _mm512_mask_blend_ps(kBits[r], _mm512_set1_ps(-scales[r]), _mm512_set1_ps(scales[r]));
    };
    __m512 sums = either(0);
    for (int r = 1; r < 4; ++r)
      sums = _mm512_add_ps(sums, either(r));
    low_ = _mm512_add_ps(sums, _mm512_set1_ps(-scales[4]));
    high_ = _mm512_add_ps(sums, _mm512_set1_ps(scales[4]));
  }

  // Lane k has the sum for bit first + k of a word of each row.
  COMMKIT_TARGET inline __m512 of(const __m512i *words, int first) const {
    const __m512i lanes = lane_numbers();
    __m512i place = _mm512_srlv_epi32(words[0], _mm512_add_epi32(lanes, _mm512_set1_epi32(first)));
    for (int r = 1; r < kRows; ++r) {
      const __m512i by = _mm512_add_epi32(lanes, _mm512_set1_epi32(first - r));
      // This bit of the word, turned, and the others of place; those above bit 4 are not looked at.
      place = _mm512_ternarylogic_epi32(_mm512_set1_epi32(1 << r), _mm512_rorv_epi32(words[r], by),
                                        place, 0xCA);
    }
    return _mm512_permutex2var_ps(low_, place, high_);
  }

private:
  __m512 low_, high_;
};

COMMKIT_TARGET inline __m512i word_at(const uint8_t *bits) {
  int32_t word;
  __builtin_memcpy(&word, bits, sizeof word);
  return _mm512_set1_epi32(word);
}

template <bool kAccumulate, bool kLookUp>
COMMKIT_TARGET void sum_signs_as(float *out, int64_t n, const uint8_t *const *bits,
                                 const float *scales, int rows, bool stream) {
  constexpr int kRegisters = 8, kLooked = kLookUp ? SumsOfFive::kRows : 0;
  constexpr int64_t kWidth = 16 * kRegisters;
  constexpr float kNone[SumsOfFive::kRows] = {};
  const SumsOfFive table(kLookUp ? scales : kNone);
  const __m512 minus_zero = _mm512_set1_ps(-0.0f); // what changes nothing, not even a zero's sign
  const __m512i top = _mm512_castps_si512(minus_zero);
  // Shifts that move bit 16 j + k of a word to the sign of lane k.
  const __m512i shifts[2] = {_mm512_sub_epi32(_mm512_set1_epi32(31), lane_numbers()),
                             _mm512_sub_epi32(_mm512_set1_epi32(15), lane_numbers())};
  const int64_t whole = n - n % kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    if (kAccumulate)
      loops::fetch_far<kWidth>(out + i);
    for (int r = 0; r < rows; ++r)
      __builtin_prefetch(bits[r] + i / 8 + kFetchBytes);
    __m512 sums[kRegisters];
    for (int j = 0; j < kRegisters; j += 2) {
      __m512i words[SumsOfFive::kRows];
      for (int r = 0; r < kLooked; ++r)
        words[r] = word_at(bits[r] + i / 8 + 2 * j);
      sums[j] = kLookUp ? table.of(words, 0) : minus_zero;
      sums[j + 1] = kLookUp ? table.of(words, 16) : minus_zero;
    }
    for (int r = kLooked; r < rows; ++r) {
      const __m512i plus = _mm512_castps_si512(_mm512_set1_ps(scales[r]));
      for (int j = 0; j < kRegisters; ++j) {
        const __m512i word = word_at(bits[r] + i / 8 + 4 * (j / 2));
        // plus ^ (~sign & top)
        const __m512i x = _mm512_ternarylogic_epi32(_mm512_sllv_epi32(word, shifts[j % 2]), top,
                                                    plus, 0xA6);
        sums[j] = _mm512_add_ps(sums[j], _mm512_castsi512_ps(x));
      }
    }
    for (int j = 0; j < kRegisters; ++j) {
      float *to = out + i + 16 * j;
      put(to, kAccumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sums[j]) : sums[j], stream);
    }
  }
  loops::sum_signs(out, whole, n, bits, scales, rows, kAccumulate);
}

template <bool kAccumulate>
COMMKIT_TARGET void sum_signs_into(float *out, int64_t n, const uint8_t *const *bits,
                                   const float *scales, int rows, bool stream) {
  if (rows >= SumsOfFive::kRows)
    sum_signs_as<kAccumulate, true>(out, n, bits, scales, rows, stream);
  else
    sum_signs_as<kAccumulate, false>(out, n, bits, scales, rows, stream);
}

COMMKIT_TARGET void sum_signs(float *out, int64_t n, const uint8_t *const *bits,
                              const float *scales, int rows, bool accumulate, bool stream) {
  stream = stream && is_aligned(out);
  if (accumulate)
    sum_signs_into<true>(out, n, bits, scales, rows, stream);
  else
    sum_signs_into<false>(out, n, bits, scales, rows, stream);
}

Table make(const Table &avx2) {
  Table t = avx2;
  t.name = "avx512";
  t.encode_signs = encode_signs;
  t.compensate_and_encode = compensate_and_encode;
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
