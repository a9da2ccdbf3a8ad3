// Small integers, several to a byte.
#include <algorithm>

#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

namespace {

// body(begin, count) over pieces whose begin is a multiple of kChunk.
template <class Body> void over_chunks(int64_t n, int threads, const Body &body) {
  parallel_for((n + kChunk - 1) / kChunk, kChunk, threads, [&](int64_t begin, int64_t end) {
    body(begin * kChunk, std::min(n, end * kChunk) - begin * kChunk);
  });
}

} // namespace

void ck_ternarize(const void *x, int dtype, int64_t n, float scale, const uint32_t *keys,
                  int8_t *codes, int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const float divisor = scale > 0 ? scale : 1.0f;
  over_chunks(n, threads, [&](int64_t begin, int64_t count) {
    input.each(begin, begin + count, [&](const float *piece, int64_t at, int64_t size) {
      t.ternarize(piece, size, divisor, keys, static_cast<uint32_t>(at), codes + at);
    });
  });
}

void ck_pack_ternary(const int8_t *codes, int64_t n, uint8_t *packed, int threads) {
  const Table &t = table();
  over_chunks(n, threads, [&](int64_t begin, int64_t count) {
    t.pack_ternary(codes + begin, count, packed + begin / 4);
  });
}

void ck_pack_nibbles(const int8_t *codes, int64_t n, uint8_t *packed, int threads) {
  const Table &t = table();
  over_chunks(n, threads, [&](int64_t begin, int64_t count) {
    t.pack_nibbles(codes + begin, count, packed + begin / 2);
  });
}
