// Loops over a few threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace commkit {

// Below this many elements per thread, starting one costs more than it brings.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

// body(begin, end) over consecutive parts of [0, units). Threads live for one call: starting them
// takes some 20 us where the work takes milliseconds, and in return there is no pool to survive a
// fork, and none to fight with torch's OpenMP over cores.
template <class Body>
void parallel_for(int64_t units, int64_t unit_elements, int threads, const Body &body) {
  const int64_t worth = units * unit_elements / kElementsPerThread;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, worth, units}));
  std::vector<std::thread> others;
  int64_t begin = 0;
  for (int64_t part = 0; part + 1 < parts; ++part) {
    const int64_t end = units * (part + 1) / parts;
    try {
      others.emplace_back([&body, begin, end] { body(begin, end); });
    } catch (const std::system_error &) {
      break; // no thread to be had: the rest is done here
    }
    begin = end;
  }
  body(begin, units);
  for (auto &other : others)
    other.join();
}

} // namespace commkit
