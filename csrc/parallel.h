// Loops over a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace commkit {

// Below this many elements per thread, waking one costs more than it brings.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

// work(data) on so many threads, or on fewer where there are no more to be had, and always on this one;
// returns when all are done.
void run_on_threads(int threads, void (*work)(void *), void *data);

// body(begin, end) over pieces of [0, units), each of about kElementsPerThread elements. Whichever thread
// is free takes the next: one that comes late, because its core is busy, holds up nobody.
template <class Body>
void parallel_for(int64_t units, int64_t unit_elements, int threads, const Body &body) {
  struct Work {
    const Body &body;
    const int64_t units, pieces;
    std::atomic<int64_t> next{0};
  };
  const int64_t worth = units * unit_elements / kElementsPerThread;
  Work work{body, units, std::min(units, worth)};
  if (threads <= 1 || work.pieces <= 1)
    return body(0, units);
  run_on_threads(
      threads,
      [](void *data) {
        Work &all = *static_cast<Work *>(data);
        for (int64_t i; (i = all.next++) < all.pieces;)
          all.body(all.units * i / all.pieces, all.units * (i + 1) / all.pieces);
      },
      &work);
}

} // namespace commkit
