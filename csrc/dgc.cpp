// One step of Deep Gradient Compression (Lin et al. 2018): momentum correction, the largest elements,
// and masking, in one pass over memory.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "candidates.h"
#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

namespace {

constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLower = 0.8f;
constexpr int kTries = 10;

class Step {
public:
  Step(const Input &g, const Correction &how, bool masking, float negligible, int64_t n, float *u,
       float *v, int threads)
      : t_(table()), g_(g), how_(how), masking_(masking), negligible_(negligible), n_(n), u_(u),
        v_(v), threads_(threads) {}

  void operator()(const Sample &sample, int64_t low_rank, int64_t high_rank, int64_t k,
                  int64_t *places, float *values) {
    Cut cut = cut_from(sample, low_rank, high_rank);
    Parts parts = correct(cut, k);
    if (size_of(parts) < k) {
      restore(parts, cut.high);
      parts = search(cut.low, k);
      cut.high = std::numeric_limits<float>::quiet_NaN(); // nothing is masked
    }
    choose(parts, cut.high, k, places, values);
  }

private:
  // From sampled elements, of which u and v are formed ahead of the pass. high_rank 0: there is none.
  Cut cut_from(const Sample &sample, int64_t low_rank, int64_t high_rank) const {
    Order order = sampled_orders(
        sample, n_, threads_, [&](int64_t i) { prefetch(i); },
        [&](int64_t i) {
          float u, v;
          correct_one(i, &u, &v);
          return v;
        });
    Order again = order;
    // NaN is not below anything: as a limit it would make candidates of all.
    const float low = std::min(magnitude(ranked(order, low_rank)), kInfinity);
    float high = kInfinity;
    if (high_rank)
      high = std::min(magnitude(ranked(again, high_rank)), kInfinity);
    // What is sent for certain loses its velocity as well.
    return {std::max(low, kSmallest), std::max(high, std::nextafter(negligible_, kInfinity)),
            masking_};
  }

  static float magnitude(uint32_t order) {
    const float x = loops::float_of(order);
    return x == x ? x : kInfinity;
  }

  void prefetch(int64_t i) const {
    g_.prefetch(i);
    if (how_.velocity)
      __builtin_prefetch(how_.velocity + i);
    if (how_.unsent)
      __builtin_prefetch(how_.unsent + i);
  }

  void correct_one(int64_t i, float *u, float *v) const {
    const float g = g_.at(i);
    loops::correct_momentum(&g, how_.from(i), 1, u, v);
  }

  // The pass: writes u and v, less what is sent for certain.
  Parts correct(const Cut &cut, int64_t k) const {
    const bool stream = n_ >= kWorthStreaming;
    return collect_candidates(n_, threads_, k + k / 4, [&](int64_t begin, int64_t end, Candidates &part) {
      int64_t places[kChunk];
      float values[kChunk];
      g_.each(begin, end, [&](const float *g, int64_t at, int64_t count) {
        part.append(places, values,
                    t_.correct_and_select(g, how_.from(at), cut, count, stream, u_ + at, v_ + at,
                                          at, places, values));
      });
      if (stream)
        t_.drain();
    });
  }

  // Those of v, of which nothing is masked, whose magnitude is not below the limit.
  Parts at_least(float limit, int64_t k) const {
    return collect_candidates(n_, threads_, k, [&](int64_t begin, int64_t end, Candidates &part) {
      int64_t places[kChunk];
      float values[kChunk];
      for (int64_t at = begin; at < end; at += kChunk) {
        const int64_t found = t_.select(v_ + at, std::min(kChunk, end - at), limit, at, places);
        for (int64_t i = 0; i < found; ++i)
          values[i] = v_[places[i]];
        part.append(places, values, found);
      }
    });
  }

  // k candidates at least, where the first cut was too high.
  Parts search(float limit, int64_t k) const {
    for (int i = 0; i < kTries && limit > kSmallest; ++i) {
      limit = std::max(limit * kLower, kSmallest);
      Parts parts = at_least(limit, k);
      if (size_of(parts) >= k)
        return parts;
    }
    Parts parts = at_least(kSmallest, k);
    if (size_of(parts) < k)
      parts = {with_zeros(parts, k)};
    return parts;
  }

  // All that are not zero, and the first zeros: k together.
  Candidates with_zeros(const Parts &parts, int64_t k) const {
    Candidates all;
    int64_t zeros = k - size_of(parts), at = 0;
    const auto take_zeros = [&](int64_t end) {
      for (; at < end && zeros > 0; ++at, --zeros)
        all.append(&at, v_ + at, 1);
    };
    for (const Candidates &part : parts)
      for (size_t i = 0; i < part.size(); ++i) {
        take_zeros(part.places[i]);
        all.append(&part.places[i], &part.values[i], 1);
        at = part.places[i] + 1;
      }
    take_zeros(n_);
    return all;
  }

  // Undoes the masking of the pass.
  void restore(const Parts &parts, float high) const {
    for (const Candidates &part : parts)
      for (size_t i = 0; i < part.size(); ++i)
        if (!(std::fabs(part.values[i]) < high))
          unmask(part.places[i]);
  }

  void unmask(int64_t i) const {
    float u;
    correct_one(i, &u, v_ + i);
    if (masking_)
      u_[i] = u;
  }

  void mask(int64_t i, float value) const {
    v_[i] = 0;
    if (masking_ && !(std::fabs(value) <= negligible_))
      u_[i] = 0;
  }

  // What is not below `high` is masked; NaN: nothing is.
  void choose(const Parts &parts, float high, int64_t k, int64_t *places, float *values) const {
    choose_largest(
        parts, [high](float value) { return !(std::fabs(value) < high) && high == high; }, k,
        threads_, places, values,
        [&](int64_t place, bool masked) {
          if (!masked) {
            __builtin_prefetch(v_ + place, 1);
            if (masking_)
              __builtin_prefetch(u_ + place, 1);
          }
        },
        [&](int64_t place, float value, bool masked) {
          if (!masked)
            mask(place, value);
        },
        [&](int64_t place, bool masked) {
          if (masked)
            unmask(place);
        });
  }

  const Table &t_;
  const Input &g_;
  const Correction how_;
  const bool masking_;
  const float negligible_;
  const int64_t n_;
  float *const u_, *const v_;
  const int threads_;
};

} // namespace

int ck_dgc_step(const void *g, int dtype, int64_t n, const float *velocity, const float *unsent,
                float momentum, int nesterov, int masking, float negligible, int64_t first,
                int64_t stride, int64_t group, int64_t low_rank, int64_t high_rank, int64_t k, float *u,
                float *v, int64_t *places, float *values, int threads) {
  const Input input(g, dtype, table());
  try {
    Step step(input, {velocity, unsent, momentum, nesterov != 0}, masking != 0, negligible, n, u, v,
              threads);
    step({first, stride, group}, low_rank, high_rank, k, places, values);
    return 0;
  } catch (const std::bad_alloc &) {
    return -1;
  }
}
