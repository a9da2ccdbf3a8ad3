// Updates of whole tensors, a quad per thread.
#include "momentum.h"

using namespace commkit;

namespace {

template <class T> __global__ void correct(const T *g, int64_t n, Momentum how, bool vectors) {
  const int64_t i = 4 * thread_id();
  float v[4];
  if (vectors && i + 4 <= n)
    correct_quad<true>(g, i, n, how, v);
  else if (i < n)
    correct_quad<false>(g, i, n, how, v);
}

struct Adam {
  float *p, *exp_avg;
  const float *momentum, *denominator;
  float keep, size;
};

template <bool kWhole> GPU_INLINE void adam_quad(int64_t i, int64_t n, const Adam &adam) {
  float p[4], m[4], d[4];
  load_quad<kWhole>(adam.p, i, n, p);
  load_quad<kWhole>(adam.momentum, i, n, m);
  load_quad<kWhole>(adam.denominator, i, n, d);
  for (int k = 0; k < 4; ++k)
    p[k] = p[k] * adam.keep + -adam.size * m[k] / d[k];
  store_quad<kWhole>(adam.exp_avg, i, n, m);
  store_quad<kWhole>(adam.p, i, n, p);
}

__global__ void step_adam(Adam adam, int64_t n, bool vectors) {
  const int64_t i = 4 * thread_id();
  if (vectors && i + 4 <= n)
    adam_quad<true>(i, n, adam);
  else if (i < n)
    adam_quad<false>(i, n, adam);
}

} // namespace

int ck_cuda_correct_momentum(const void *g, int dtype, int64_t n, const float *velocity,
                             const float *unsent, float momentum, int nesterov, float *u, float *v,
                             void *stream) {
  if (n == 0)
    return 0;
  const Momentum how = {velocity, unsent, momentum, nesterov != 0, u, v};
  return with_dtype(g, dtype, [&](auto from) -> int {
    return GPU_LAUNCH(correct, blocks_of_threads((n + 3) / 4), kThreads,
                      static_cast<cudaStream_t>(stream), from, n, how,
                      is_aligned(how) && is_aligned<4>(from));
  });
}

int ck_cuda_frozen_adam(float *p, float *exp_avg, const float *momentum, const float *denominator,
                        float keep, float size, int64_t n, void *stream) {
  if (n == 0)
    return 0;
  const bool vectors = is_aligned<4>(p) && is_aligned<4>(exp_avg) && is_aligned<4>(momentum) &&
                       is_aligned<4>(denominator);
  return GPU_LAUNCH(step_adam, blocks_of_threads((n + 3) / 4), kThreads,
                    static_cast<cudaStream_t>(stream),
                    (Adam{p, exp_avg, momentum, denominator, keep, size}), n, vectors);
}
