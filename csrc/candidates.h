// Elements that may be among the k largest, and the k largest of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <numeric>
#include <vector>

#include "order.h"
#include "parallel.h"
#include "table.h"

namespace commkit {

// Of one part of the tensor, in rising order.
struct Candidates {
  std::vector<int64_t> places;
  std::vector<float> values;

  size_t size() const { return places.size(); }
  void reserve(int64_t count) {
    places.reserve(count);
    values.reserve(count);
  }
  void append(const int64_t *place, const float *value, int64_t count) {
    places.insert(places.end(), place, place + count);
    values.insert(values.end(), value, value + count);
  }
};
using Parts = std::vector<Candidates>;

inline int64_t size_of(const Parts &parts) {
  int64_t size = 0;
  for (const Candidates &part : parts)
    size += static_cast<int64_t>(part.size());
  return size;
}

// Elements at first, first + stride ..., and the `group` - 1 that follow each; group <= stride.
struct Sample {
  int64_t first, stride, group;
};

// The orders of the sampled of n elements. fetch(i) comes well before value(i).
template <class Fetch, class Value>
Order sampled_orders(const Sample &sample, int64_t n, int threads, const Fetch &fetch,
                     const Value &value) {
  constexpr int64_t kAhead = 16, kCost = 32; // a line of the cache each
  const int64_t groups = (n - sample.first + sample.stride - 1) / sample.stride;
  const auto begins = [&](int64_t i) { return sample.first + i * sample.stride; };
  Order order(groups * sample.group - std::max<int64_t>(0, begins(groups - 1) + sample.group - n));
  parallel_for(groups, std::min(sample.stride, kCost), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i)
      fetch(begins(i));
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end)
        fetch(begins(i + kAhead));
      for (int64_t k = 0; k < sample.group && begins(i) + k < n; ++k)
        order[i * sample.group + k] = order_of(value(begins(i) + k));
    }
  });
  return order;
}

// find(begin, end, part) for parts of n elements, each of whole chunks and worth a thread.
template <class Part, class Find>
std::vector<Part> collect(int64_t n, int threads, const Find &find) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const int64_t count = std::max<int64_t>(1, n / kElementsPerThread);
  std::vector<Part> parts(count);
  std::atomic<bool> failed{false};
  parallel_for(count, n / count, threads, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t p = begin; p < end; ++p)
        find(chunks * p / count * kChunk, std::min(n, chunks * (p + 1) / count * kChunk), parts[p]);
    } catch (const std::bad_alloc &) {
      failed = true;
    }
  });
  if (failed)
    throw std::bad_alloc();
  return parts;
}

// The same, where so many candidates are expected in all.
template <class Find>
Parts collect_candidates(int64_t n, int threads, int64_t expected, const Find &find) {
  return collect<Candidates>(n, threads, [&](int64_t begin, int64_t end, Candidates &part) {
    part.reserve(expected * (end - begin) / std::max<int64_t>(n, 1));
    find(begin, end, part);
  });
}

// The order of the k-th largest; those of which is_first(value) are the largest of all.
template <class IsFirst> uint32_t kth(const Parts &parts, const IsFirst &is_first, int64_t k) {
  Order order;
  // Without a branch, which could not be guessed.
  const auto gather = [&](bool first) {
    order.resize(size_of(parts));
    size_t count = 0;
    for (const Candidates &part : parts)
      for (const float value : part.values) {
        order[count] = order_of(value);
        count += is_first(value) == first;
      }
    order.resize(count);
  };
  gather(false);
  const int64_t first = size_of(parts) - static_cast<int64_t>(order.size());
  if (first < k)
    return ranked(order, k - first);
  gather(true);
  return ranked(order, k);
}

// The k largest of at least k candidates, and of equal ones the first, in rising order. take(place,
// value, first) and leave(place, first) hear of each, well after fetch(place, first).
template <class IsFirst, class Fetch, class Take, class Leave>
void choose_largest(const Parts &parts, const IsFirst &is_first, int64_t k, int threads,
                    int64_t *places, float *values, const Fetch &fetch, const Take &take,
                    const Leave &leave) {
  constexpr size_t kAhead = 32;
  const uint32_t least = kth(parts, is_first, k);
  std::vector<int64_t> begin(parts.size()), equal(parts.size());
  const auto count = static_cast<int64_t>(parts.size());
  // Visiting a candidate costs as much as so many elements that are passed by.
  constexpr int64_t kRead = 4, kTaken = 16;
  parallel_for(count, k * kRead / count, threads, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      int64_t above = 0, same = 0;
      for (const float value : parts[p].values) {
        above += order_of(value) > least;
        same += order_of(value) == least;
      }
      begin[p] = above;
      equal[p] = same;
    }
  });
  const int64_t above = std::accumulate(begin.begin(), begin.end(), int64_t{0});
  int64_t at = 0, wanted = k - above; // of those that equal the least
  for (size_t p = 0; p < parts.size(); ++p) {
    equal[p] = std::min(equal[p], wanted);
    wanted -= equal[p];
    const int64_t chosen = begin[p] + equal[p];
    begin[p] = at;
    at += chosen;
  }
  parallel_for(count, k * kTaken / count, threads, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      int64_t next = begin[p], ties = equal[p];
      for (size_t i = 0; i < parts[p].size(); ++i) {
        if (i + kAhead < parts[p].size())
          fetch(parts[p].places[i + kAhead], is_first(parts[p].values[i + kAhead]));
        const int64_t place = parts[p].places[i];
        const float value = parts[p].values[i];
        const uint32_t order = order_of(value);
        if (order > least || (order == least && ties-- > 0)) {
          places[next] = place;
          values[next++] = value;
          take(place, value, is_first(value));
        } else {
          leave(place, is_first(value));
        }
      }
    }
  });
}

} // namespace commkit
