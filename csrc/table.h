// The functions that exist once per instruction set. They work on one piece, on one thread.
#pragma once

#include <cstdint>

namespace commkit {

// Pieces that stay in the first-level cache.
constexpr int64_t kChunk = 1024;
// From so many floats on, stores go past the caches: where the next pass reads them, and where it
// hardly does.
constexpr int64_t kBeyondCaches = int64_t{1} << 21;
constexpr int64_t kBytesBeyondCaches = kBeyondCaches * 4;
constexpr int64_t kWorthStreaming = int64_t{1} << 18;
// Where the processor's own prefetching, which ends with a page, is not enough, what comes is asked for
// ahead. Of two streams by so many floats, a page: nearer than that is in its way.
constexpr int64_t kFetch = 1024;
// Of one beside long calculations, or beside many that are read slowly, and of each of those.
constexpr int64_t kFetchFar = 2048, kFetchBytes = 256;
// Of a row of a tile, kept in registers.
constexpr int64_t kColumns = 32;

// Momentum correction, see reference.correct_momentum_. Without a velocity or an unsent they are null.
struct Correction {
  const float *velocity, *unsent;
  float momentum;
  bool nesterov;

  Correction from(int64_t at) const {
    return {velocity ? velocity + at : nullptr, unsent ? unsent + at : nullptr, momentum, nesterov};
  }
};

// What a step of Deep Gradient Compression takes out of v on its way: what is not below `low` is a
// candidate; what is not below `high` is sent for certain, so v is written as 0 there, and so is u
// with masking.
struct Cut {
  float low, high;
  bool masking;
};

// Increasing levels, of which a code is the place. The bounds are what lies half-way between two of
// them, or with `random` the levels themselves; both are padded with infinity.
struct Codebook {
  static constexpr int kMost = 256;
  float levels[kMost], bounds[kMost];
  int32_t count;
  bool random;
};

struct Table {
  const char *name;

  // bit k of byte j = x[8 j + k] >= 0; unused bits are 0.
  void (*pack_signs)(const float *x, int64_t n, uint8_t *bits);
  // The same, and the sum of |x| in 16 interleaved partial sums of float64.
  double (*encode_signs)(const float *x, int64_t n, uint8_t *bits);
  // The same of sum = (residual less sent, towards or past zero) * decay + g; sum may be residual, or
  // g. stream: see correct_momentum.
  double (*compensate_and_encode)(const float *residual, const float *g, float *sum, int64_t n,
                                  float decay, float sent, bool stream, uint8_t *bits);
  void (*sum_signs)(float *out, int64_t n, const uint8_t *const *bits, const float *scales,
                    int rows, bool accumulate, bool stream);

  // Largest |x| as the bits of a float, which order like integers: NaN is above all.
  uint32_t (*peak)(const float *x, int64_t n);
  // In 16 interleaved partial sums of float64, in which no square of a float is too large or too small.
  double (*sum_of_squares)(const float *x, int64_t n);
  // Of finite x with |x * inverse| <= top but for rounding. The baseline's take any x. stream: see
  // correct_momentum.
  void (*round_nearest)(const float *x, int64_t n, float inverse, float top, bool stream,
                        int8_t *codes);
  void (*round_randomly)(const float *x, int64_t n, float inverse, float top, const uint32_t *keys,
                         uint32_t first, bool stream, int8_t *codes);
  void (*round_e3m0)(const float *x, int64_t n, float divisor, const uint32_t *keys, uint32_t first,
                     int8_t *codes);
  void (*pack_nibbles)(const int8_t *codes, int64_t n, uint8_t *packed);
  void (*unpack_nibbles)(const uint8_t *packed, int64_t n, int8_t *codes);
  // out = before + code * scale / divisor; before is null, or out, or apart from it. stream: see
  // correct_momentum.
  void (*scale_codes)(const int8_t *codes, int64_t n, float scale, float divisor,
                      const float *before, bool stream, float *out);
  // The same for codes of round_e3m0.
  void (*scale_levels)(const int8_t *codes, int64_t n, float scale, float divisor,
                       const float *before, bool stream, float *out);
  void (*add)(const float *x, int64_t n, float *out);

  void (*noise)(const uint32_t *keys, uint32_t first, int64_t n, float *out);
  void (*ternarize)(const float *x, int64_t n, float divisor, const uint32_t *keys, uint32_t first,
                    int8_t *codes);
  void (*pack_ternary)(const int8_t *codes, int64_t n, uint8_t *packed);
  void (*unpack_ternary)(const uint8_t *packed, int64_t n, int8_t *codes);

  // low = min(itself, x) and high = max(itself, x), as integers of the same order; see ordered.
  void (*extremes)(const float *x, int64_t n, int32_t *low, int32_t *high);
  // Codes of x / divisor, rounded to nearest if keys is null.
  void (*round_to_levels)(const float *x, int64_t n, float divisor, const Codebook &book,
                          const uint32_t *keys, uint32_t first, uint8_t *codes);
  // Signs and exponents of finite x, not above the power of two with this exponent field.
  void (*round_to_powers)(const float *x, int64_t n, int32_t top, const uint32_t *keys,
                          uint32_t first, uint8_t *codes);
  void (*look_up)(const uint8_t *codes, int64_t n, const float *levels, float scale, float *out);

  // Appends first + i of every |x[i]| not below the threshold to out, which has room for n; returns
  // how many.
  int64_t (*select)(const float *x, int64_t n, float threshold, int64_t first, int64_t *out);

  // tops[i % lanes] = max(itself, bits of |x[i]|); lanes is a multiple of 32.
  void (*lane_peaks)(const float *x, int64_t n, int64_t lanes, int32_t *tops);

  // stream: past the caches, where the processor can; then drain() comes before another thread reads.
  void (*correct_momentum)(const float *g, const Correction &how, int64_t n, bool stream, float *u,
                           float *v);
  // The same, and appends first + i and v[i] of candidates to places and values, which have room
  // for n; returns how many.
  int64_t (*correct_and_select)(const float *g, const Correction &how, const Cut &cut, int64_t n,
                                bool stream, float *u, float *v, int64_t first, int64_t *places,
                                float *values);
  void (*drain)();
  void (*frozen_adam)(float *p, float *exp_avg, const float *momentum, const float *denominator,
                      float keep, float size, int64_t n);

  // Line l of out = the sum of shares[l * count + i] * rows[which[i]]; rows and lines are of stride
  // floats, a multiple of kColumns.
  void (*mix_rows)(const float *shares, int64_t lines, const int32_t *which, int64_t count,
                   const float *rows, int64_t stride, float *out);

  void (*widen_bfloat16)(const uint16_t *x, int64_t n, float *out);
  void (*widen_float16)(const uint16_t *x, int64_t n, float *out);
};

const Table &baseline_table();
// Null where the build or the processor has none.
const Table *avx2_table();
const Table *avx512_table();

} // namespace commkit
