#include <algorithm>

#include "dispatch.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

void ck_uniform_noise(float *out, int64_t n, const uint32_t *keys, int threads) {
  const Table &t = table();
  parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
    t.noise(keys, static_cast<uint32_t>(begin), end - begin, out + begin);
  });
}
