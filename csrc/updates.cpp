// Updates of whole tensors.
#include <algorithm>

#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

void ck_correct_momentum(const void *g, int dtype, int64_t n, const float *velocity,
                         const float *unsent, float momentum, int nesterov, float *u, float *v,
                         int threads) {
  const Table &t = table();
  const Input input(g, dtype, t);
  const Correction how = {velocity, unsent, momentum, nesterov != 0};
  const bool stream = n >= kBeyondCaches; // v is read next
  parallel_for(n / kChunk + 1, kChunk, threads, [&](int64_t begin, int64_t end) {
    input.each(begin * kChunk, std::min(n, end * kChunk),
               [&](const float *piece, int64_t at, int64_t count) {
                 t.correct_momentum(piece, how.from(at), count, stream, u + at, v + at);
               });
    if (stream)
      t.drain();
  });
}

void ck_frozen_adam(float *p, float *exp_avg, const float *momentum, const float *denominator,
                    float keep, float size, int64_t n, int threads) {
  const Table &t = table();
  parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
    t.frozen_adam(p + begin, exp_avg + begin, momentum + begin, denominator + begin, keep, size,
                  end - begin);
  });
}
