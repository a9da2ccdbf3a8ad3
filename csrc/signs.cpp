// One bit per element.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

void ck_encode_signs(const void *x, int dtype, int64_t n, uint8_t *bits, double *l1, int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  // Partial sums belong to chunks, not to threads, and are added in order.
  std::vector<double> sums(l1 ? chunks : 0);
  parallel_for(chunks, kChunk, threads, [&](int64_t begin, int64_t end) {
    input.each(begin * kChunk, std::min(n, end * kChunk),
               [&](const float *piece, int64_t at, int64_t count) {
                 if (l1)
                   sums[at / kChunk] = t.encode_signs(piece, count, bits + at / 8);
                 else
                   t.pack_signs(piece, count, bits + at / 8);
               });
  });
  if (l1) {
    *l1 = 0;
    for (double sum : sums)
      *l1 += sum;
  }
}

void ck_sum_signs(float *out, int64_t n, const uint8_t *const *bits, const float *scales, int rows,
                  int accumulate, int threads) {
  ck_foreach_sum_signs(scales, bits, rows, &out, &n, 1, accumulate, threads);
}
