// Loops over a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace commkit {

// Below this many elements per thread, waking one costs more than it brings.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

// work(data, thread) on so many threads, or on fewer where there are no more to be had, and always on
// this one, which is 0; returns when all are done.
void run_on_threads(int threads, void (*work)(void *, int), void *data);

// body(begin, end) over pieces of [0, units), each of about kElementsPerThread elements. The pieces of
// one stretch belong to one thread, the same in every call, so that what it has written is not
// fetched out of another core's caches. Whichever is done with its own helps the others: one that
// comes late, because its core is busy, holds up nobody.
template <class Body>
void parallel_for(int64_t units, int64_t unit_elements, int threads, const Body &body) {
  const int64_t pieces = std::min(units, units * unit_elements / kElementsPerThread);
  if (threads <= 1 || pieces <= 1)
    return body(0, units);
  struct alignas(64) Stretch { // no two on one line of the cache
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Work {
    const Body &body;
    const int64_t units, pieces;
    std::vector<Stretch> stretches;
  };
  const auto count = static_cast<size_t>(std::min<int64_t>(threads, pieces));
  Work work{body, units, pieces, std::vector<Stretch>(count)};
  for (size_t s = 0; s < count; ++s) {
    work.stretches[s].next = pieces * static_cast<int64_t>(s) / static_cast<int64_t>(count);
    work.stretches[s].end = pieces * static_cast<int64_t>(s + 1) / static_cast<int64_t>(count);
  }
  run_on_threads(
      static_cast<int>(count),
      [](void *data, int thread) {
        Work &all = *static_cast<Work *>(data);
        const size_t count = all.stretches.size();
        for (size_t s = 0; s < count; ++s) {
          Stretch &own = all.stretches[(static_cast<size_t>(thread) + s) % count];
          for (int64_t i; (i = own.next++) < own.end;)
            all.body(all.units * i / all.pieces, all.units * (i + 1) / all.pieces);
        }
      },
      &work);
}

} // namespace commkit
