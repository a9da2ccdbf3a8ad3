// A few elements out of many.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <vector>

#include "candidates.h"
#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "loops.h"
#include "order.h"
#include "parallel.h"

using namespace commkit;

namespace {

using Indices = std::vector<int64_t>;

template <class Index>
bool scatter(float *out, int64_t n, const Index *indices, const float *values, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    if (indices[i] < 0 || indices[i] >= n)
      return false;
  for (int64_t i = 0; i < k; ++i)
    out[indices[i]] += values[i];
  return true;
}

// The k largest of one row. Candidates are what is not below a bound that at least k elements
// reach.
class RowSelector {
public:
  RowSelector(const Input &input, const Table &table, int64_t n, int64_t k)
      : input_(input), table_(table), n_(n), k_(k) {
    // Of many lanes' maxima the k-th is close to the k-th of all.
    while (lanes_ < 4 * k && lanes_ < kChunk)
      lanes_ *= 2;
    bounded_ = 2 * k <= lanes_ && 4 * lanes_ <= n;
  }

  void operator()(int64_t row, int64_t *out) {
    const int64_t begin = row * n_, end = begin + n_;
    order_.clear();
    places_.clear();
    if (bounded_)
      find(begin, end, bound(begin, end));
    else
      input_.each(begin, end, [&](const float *piece, int64_t, int64_t count) {
        std::transform(piece, piece + count, std::back_inserter(order_), order_of);
      });
    scratch_ = order_;
    const uint32_t least = ranked(scratch_, k_);
    int64_t equal = k_; // wanted of those that equal the least
    for (const uint32_t key : order_)
      equal -= key > least;
    for (size_t i = 0; i < order_.size(); ++i)
      if (order_[i] > least || (order_[i] == least && equal-- > 0))
        *out++ = bounded_ ? places_[i] : static_cast<int64_t>(i);
  }

private:
  void find(int64_t begin, int64_t end, float bound) {
    input_.each(begin, end, [&](const float *piece, int64_t at, int64_t count) {
      int64_t own[kChunk];
      const int64_t found = table_.select(piece, count, bound, 0, own);
      for (int64_t i = 0; i < found; ++i) {
        order_.push_back(order_of(piece[own[i]]));
        places_.push_back(at - begin + own[i]);
      }
    });
  }

  float bound(int64_t begin, int64_t end) {
    alignas(32) int32_t tops[kChunk] = {};
    input_.each(begin, end, [&](const float *piece, int64_t, int64_t count) {
      table_.lane_peaks(piece, count, lanes_, tops);
    });
    std::nth_element(tops, tops + k_ - 1, tops + lanes_, std::greater<int32_t>());
    return loops::float_of(static_cast<uint32_t>(tops[k_ - 1]));
  }

  const Input &input_;
  const Table &table_;
  int64_t n_, k_, lanes_ = 32;
  bool bounded_;
  Order order_, scratch_;
  Indices places_;
};

} // namespace

int64_t ck_select_at_least(const void *x, int dtype, int64_t n, float threshold, void **found,
                           int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  try {
    auto lists = collect<Indices>(n, threads, [&](int64_t begin, int64_t end, Indices &list) {
      int64_t own[kChunk];
      input.each(begin, end, [&](const float *piece, int64_t at, int64_t size) {
        list.insert(list.end(), own, own + t.select(piece, size, threshold, at, own));
      });
    });
    auto all = std::make_unique<Indices>(std::move(lists[0]));
    for (size_t part = 1; part < lists.size(); ++part)
      all->insert(all->end(), lists[part].begin(), lists[part].end());
    const auto count = static_cast<int64_t>(all->size());
    *found = all.release();
    return count;
  } catch (const std::bad_alloc &) {
    return -1;
  }
}

void ck_take(void *found, int64_t *out) {
  const std::unique_ptr<Indices> all(static_cast<Indices *>(found));
  if (!all->empty())
    std::memcpy(out, all->data(), all->size() * sizeof(int64_t));
}

int ck_ranked_magnitude(const void *x, int dtype, int64_t n, int64_t first, int64_t stride,
                        int64_t rank, float *out, int threads) {
  const Input input(x, dtype, table());
  try {
    Order order((n - first + stride - 1) / stride);
    const auto size = static_cast<int64_t>(order.size());
    // Each costs a line of the cache.
    parallel_for(size, std::min<int64_t>(stride, 16), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        order[i] = order_of(input.at(first + i * stride));
    });
    *out = loops::float_of(ranked(order, rank));
    return 0;
  } catch (const std::bad_alloc &) {
    return -1;
  }
}

int ck_largest_of_rows(const void *x, int dtype, int64_t rows, int64_t n, int64_t k, int64_t *out,
                       int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  std::atomic<bool> failed{false};
  parallel_for(rows, n, threads, [&](int64_t begin, int64_t end) {
    try {
      RowSelector select(input, t, n, k);
      for (int64_t row = begin; row < end; ++row)
        select(row, out + row * k);
    } catch (const std::bad_alloc &) {
      failed = true;
    }
  });
  return failed ? -1 : 0;
}

int ck_scatter_accumulate(float *out, int64_t n, const void *indices, int index_bytes,
                          const float *values, int64_t k) {
  const bool done = index_bytes == 4
                        ? scatter(out, n, static_cast<const int32_t *>(indices), values, k)
                        : scatter(out, n, static_cast<const int64_t *>(indices), values, k);
  return done ? 0 : -1;
}
