// Momentum correction of a quad; see reference.correct_momentum_.
#pragma once

#include "tile.h"

namespace commkit {

struct Momentum {
  const float *velocity, *unsent; // may be null
  float momentum;
  bool nesterov;
  float *u, *v;
};

inline bool is_aligned(const Momentum &how) {
  return is_aligned<4>(how.velocity) && is_aligned<4>(how.unsent) && is_aligned<4>(how.u) &&
         is_aligned<4>(how.v);
}

// Writes u and v, which is left in v too.
template <bool kWhole, class T>
GPU_INLINE void correct_quad(const T *gradient, int64_t i, int64_t n, const Momentum &how,
                             float (&v)[4]) {
  float g[4], u[4];
  load_quad<kWhole>(gradient, i, n, g);
  if (how.velocity)
    load_quad<kWhole>(how.velocity, i, n, u);
  if (how.unsent)
    load_quad<kWhole>(how.unsent, i, n, v);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (how.nesterov)
      u[k] = (how.velocity ? u[k] + g[k] : g[k]) * how.momentum;
    else
      u[k] = how.velocity ? u[k] * how.momentum + g[k] : g[k];
    v[k] = how.unsent ? v[k] + u[k] : u[k];
    v[k] = how.nesterov ? v[k] + g[k] : v[k];
  }
  store_quad<kWhole>(how.u, i, n, u);
  store_quad<kWhole>(how.v, i, n, v);
}

} // namespace commkit
