// Every function in what any processor of the architecture has.
#include "loops.h"
#include "table.h"

namespace {

#define COMMKIT_TARGET
#include "entries.inc"

void pack_signs(const float *x, int64_t n, uint8_t *bits) { loops::pack_signs(x, n, bits); }
double encode_signs(const float *x, int64_t n, uint8_t *bits) {
  return loops::encode_signs(x, n, bits);
}
double compensate_and_encode(const float *residual, const float *g, float *sum, int64_t n,
                             float decay, float sent, bool, uint8_t *bits) {
  return loops::compensate_and_encode(residual, g, sum, n, decay, sent, bits);
}
void sum_signs(float *out, int64_t n, const uint8_t *const *bits, const float *scales, int rows,
               bool accumulate, bool) {
  loops::sum_signs(out, 0, n, bits, scales, rows, accumulate);
}
uint32_t peak(const float *x, int64_t n) { return loops::peak(x, n); }
void round_nearest(const float *x, int64_t n, float inverse, float top, bool, int8_t *codes) {
  loops::round_nearest(x, n, inverse, top, codes);
}
void round_randomly(const float *x, int64_t n, float inverse, float top, const uint32_t *keys,
                    uint32_t first, bool, int8_t *codes) {
  loops::round_randomly(x, n, inverse, top, keys, first, codes);
}
void scale_codes(const int8_t *codes, int64_t n, float scale, float divisor, const float *before,
                 bool, float *out) {
  loops::scale<loops::Whole>(codes, n, scale, divisor, before, out);
}
void scale_levels(const int8_t *codes, int64_t n, float scale, float divisor, const float *before,
                  bool, float *out) {
  loops::scale<loops::Exponent>(codes, n, scale, divisor, before, out);
}
void unpack_ternary(const uint8_t *packed, int64_t n, int8_t *codes) {
  loops::unpack_ternary(packed, n, codes);
}
void round_to_levels(const float *x, int64_t n, float divisor, const Codebook &book,
                     const uint32_t *keys, uint32_t first, uint8_t *codes) {
  loops::round_to_levels(x, n, divisor, book, keys, first, codes);
}
int64_t select(const float *x, int64_t n, float threshold, int64_t first, int64_t *out) {
  return loops::select(x, 0, n, threshold, first, out);
}
void correct_momentum(const float *g, const Correction &how, int64_t n, bool, float *u, float *v) {
  loops::correct_momentum(g, how, n, u, v);
}
int64_t correct_and_select(const float *g, const Correction &how, const Cut &cut, int64_t n, bool,
                           float *u, float *v, int64_t first, int64_t *places, float *values) {
  return loops::correct_and_select(g, how, cut, n, u, v, first, places, values);
}
void drain() {}
void mix_rows(const float *shares, int64_t lines, const int32_t *which, int64_t count,
              const float *rows, int64_t stride, float *out) {
  loops::mix_rows(shares, lines, which, count, rows, stride, out);
}
void widen_float16(const uint16_t *x, int64_t n, float *out) { loops::widen_float16(x, n, out); }

const Table kTable = {
    "baseline",
#include "functions.inc"
};

} // namespace

const commkit::Table &commkit::baseline_table() { return kTable; }
