// What gains from AVX-512 (F, BW, DQ, VL): the integer products of the noise. The rest is bound by
// memory and stays with AVX2.
#include "table.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include "loops.h"

#if defined(__clang__)
#define COMMKIT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define COMMKIT_TARGET                                                                             \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

namespace {

using namespace commkit;

COMMKIT_TARGET void round_randomly(const float *x, int64_t n, float inverse, float top,
                                   const uint32_t *keys, uint32_t first, int8_t *codes) {
  loops::round_randomly(x, n, inverse, top, keys, first, codes);
}

COMMKIT_TARGET void noise(const uint32_t *keys, uint32_t first, int64_t n, float *out) {
  loops::noise(keys, first, n, out);
}

COMMKIT_TARGET void ternarize(const float *x, int64_t n, float divisor, const uint32_t *keys,
                              uint32_t first, int8_t *codes) {
  loops::ternarize(x, n, divisor, keys, first, codes);
}

Table make(const Table &avx2) {
  Table t = avx2;
  t.name = "avx512";
  t.round_randomly = round_randomly;
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
