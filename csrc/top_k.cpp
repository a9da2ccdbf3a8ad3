// The largest elements of a tensor, in one pass over memory where a sample says where to cut.
#include <algorithm>
#include <limits>
#include <new>

#include "candidates.h"
#include "dispatch.h"
#include "input.h"
#include "kernels.h"

using namespace commkit;

namespace {

constexpr float kLower = 0.8f;
constexpr int kTries = 10;

// The rank-th largest magnitude of a sample; NaN, which is above all, as infinity: not below a limit of
// NaN are all.
float cut_from(const Input &x, int64_t n, const Sample &sample, int64_t rank, int threads) {
  Order order = sampled_orders(
      sample, n, threads, [&](int64_t i) { x.prefetch(i); }, [&](int64_t i) { return x.at(i); });
  const float limit = loops::float_of(ranked(order, rank));
  return limit == limit ? limit : std::numeric_limits<float>::infinity();
}

Parts at_least(const Input &x, int64_t n, float limit, int64_t expected, int threads) {
  const Table &t = table();
  return collect_candidates(n, threads, expected, [&](int64_t begin, int64_t end, Candidates &part) {
    int64_t places[kChunk];
    float values[kChunk];
    x.each(begin, end, [&](const float *piece, int64_t at, int64_t count) {
      const int64_t found = t.select(piece, count, limit, at, places);
      for (int64_t i = 0; i < found; ++i)
        values[i] = piece[places[i] - at];
      part.append(places, values, found);
    });
  });
}

} // namespace

int ck_largest(const void *x, int dtype, int64_t n, int64_t first, int64_t stride, int64_t group,
               int64_t rank, int64_t k, int64_t *places, float *values, int threads) {
  const Input input(x, dtype, table());
  try {
    float limit = cut_from(input, n, {first, stride, group}, rank, threads);
    Parts parts = at_least(input, n, limit, k + k / 4, threads);
    for (int i = 0; size_of(parts) < k; ++i) {
      limit = i < kTries ? limit * kLower : 0; // at last all are candidates
      parts = at_least(input, n, limit, k + k / 4, threads);
    }
    choose_largest(
        parts, [](float) { return false; }, k, threads, places, values,
        [](int64_t, bool) {}, [](int64_t, float, bool) {}, [](int64_t, bool) {});
    return 0;
  } catch (const std::bad_alloc &) {
    return -1;
  }
}
