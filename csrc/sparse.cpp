// A few elements out of many.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
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

} // namespace

int64_t ck_select_at_least(const float *x, int64_t n, float threshold, void **found, int threads) {
  const Table &t = table();
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  // The pieces are cut here, so that each can have its own list.
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, chunks));
  try {
    std::vector<Indices> lists(pieces);
    std::vector<char> failed(pieces, 0);
    parallel_for(pieces, n / pieces, threads, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t last = std::min(n, chunks * (piece + 1) / pieces * kChunk);
        int64_t own[kChunk];
        try {
          for (int64_t at = chunks * piece / pieces * kChunk; at < last; at += kChunk) {
            const int64_t count = t.select(x + at, std::min(kChunk, last - at), threshold, at, own);
            lists[piece].insert(lists[piece].end(), own, own + count);
          }
        } catch (const std::bad_alloc &) {
          failed[piece] = 1;
        }
      }
    });
    if (std::count(failed.begin(), failed.end(), 1))
      return -1;
    auto all = std::make_unique<Indices>(std::move(lists[0]));
    for (int64_t piece = 1; piece < pieces; ++piece)
      all->insert(all->end(), lists[piece].begin(), lists[piece].end());
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

int ck_scatter_accumulate(float *out, int64_t n, const void *indices, int index_bytes,
                          const float *values, int64_t k) {
  const bool done = index_bytes == 4
                        ? scatter(out, n, static_cast<const int32_t *>(indices), values, k)
                        : scatter(out, n, static_cast<const int64_t *>(indices), values, k);
  return done ? 0 : -1;
}
