// The functions that exist once per instruction set. They work on one piece, on one thread.
#pragma once

#include <cstdint>

namespace commkit {

// Pieces that stay in the first-level cache.
constexpr int64_t kChunk = 1024;

struct Table {
  const char *name;

  // bit k of byte j = x[8 j + k] >= 0; unused bits are 0.
  void (*pack_signs)(const float *x, int64_t n, uint8_t *bits);
  // The same, and the sum of |x| in 16 interleaved partial sums of float64.
  double (*encode_signs)(const float *x, int64_t n, uint8_t *bits);
  void (*sum_signs)(float *out, int64_t n, const uint8_t *const *bits, const float *scales,
                    int rows, bool accumulate);

  // Largest |x| as the bits of a float, which order like integers: NaN is above all.
  uint32_t (*peak)(const float *x, int64_t n);
  void (*round_nearest)(const float *x, int64_t n, float inverse, float top, int8_t *codes);
  void (*round_randomly)(const float *x, int64_t n, float inverse, float top, const uint32_t *keys,
                         uint32_t first, int8_t *codes);
  void (*pack_nibbles)(const int8_t *codes, int64_t n, uint8_t *packed);
  void (*unpack_nibbles)(const uint8_t *packed, int64_t n, int8_t *codes);
  // out = code * scale / divisor, or out += that.
  void (*scale_codes)(const int8_t *codes, int64_t n, float scale, float divisor, float *out);
  void (*add_scaled_codes)(const int8_t *codes, int64_t n, float scale, float divisor, float *out);
  void (*add)(const float *x, int64_t n, float *out);

  void (*noise)(const uint32_t *keys, uint32_t first, int64_t n, float *out);
  void (*ternarize)(const float *x, int64_t n, float divisor, const uint32_t *keys, uint32_t first,
                    int8_t *codes);
  void (*pack_ternary)(const int8_t *codes, int64_t n, uint8_t *packed);
  void (*unpack_ternary)(const uint8_t *packed, int64_t n, float *out);

  // Appends first + i of every |x[i]| >= threshold to out, which has room for n; returns how many.
  int64_t (*select)(const float *x, int64_t n, float threshold, int64_t first, int64_t *out);

  void (*widen_bfloat16)(const uint16_t *x, int64_t n, float *out);
  void (*widen_float16)(const uint16_t *x, int64_t n, float *out);
};

const Table &baseline_table();
// Null where the build or the processor has none.
const Table *avx2_table();
const Table *avx512_table();

} // namespace commkit
