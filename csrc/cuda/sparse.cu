// A few elements out of many.
#include "momentum.h"

using namespace commkit;

namespace {

// The workspace: how many there are, how many lie before each block's tile, one bit per element.
struct Marks {
  int64_t *count;
  int64_t *before;
  uint32_t *words;
};

Marks marks_in(void *workspace, int64_t n) {
  auto *const first = static_cast<int64_t *>(workspace);
  return {first, first + 1, reinterpret_cast<uint32_t *>(first + 1 + blocks_for(n))};
}

template <bool kWhole, class T>
GPU_INLINE uint32_t mark_tile(const T *x, int64_t n, int64_t tile, float threshold) {
  Tile v;
  load_tile<kWhole>(x, n, tile, v);
  uint32_t nibbles[kQuads];
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    nibbles[u] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = kWhole || quad_begin(tile, u) + k < n;
      nibbles[u] |= static_cast<uint32_t>(inside && !(fabsf(v[u][k]) < threshold)) << k;
    }
  }
  return gather_word(nibbles);
}

template <bool kWhole, class T>
GPU_INLINE uint32_t correct_and_mark_tile(const T *g, int64_t n, int64_t tile, const Momentum &how,
                                          float threshold) {
  uint32_t nibbles[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int64_t i = quad_begin(tile, q);
    float v[4];
    correct_quad<kWhole>(g, i, n, how, v);
    nibbles[q] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = kWhole || i + k < n;
      nibbles[q] |= static_cast<uint32_t>(inside && !(fabsf(v[k]) < threshold)) << k;
    }
  }
  return gather_word(nibbles);
}

// Every thread of a block calls, with the word of its lane.
GPU_INLINE void keep_marks(const Marks &marks, int64_t tile, uint32_t word) {
  marks.words[tile / 32 + lane_id()] = word;
  int total;
  block_scan<kThreads>(__popc(word), &total);
  if (threadIdx.x == 0)
    marks.before[block_id()] = total;
}

template <class T>
__global__ void mark(const T *x, int64_t n, const float *threshold, Marks marks, bool vectors) {
  const int64_t tile = tile_begin();
  uint32_t word = 0;
  if (vectors && tile + kTile <= n)
    word = mark_tile<true>(x, n, tile, *threshold);
  else if (tile < n)
    word = mark_tile<false>(x, n, tile, *threshold);
  keep_marks(marks, tile, word);
}

template <class T>
__global__ void correct_and_mark(const T *g, int64_t n, Momentum how, const float *threshold,
                                 Marks marks, bool vectors) {
  const int64_t tile = tile_begin();
  uint32_t word = 0;
  if (vectors && tile + kTile <= n)
    word = correct_and_mark_tile<true>(g, n, tile, how, *threshold);
  else if (tile < n)
    word = correct_and_mark_tile<false>(g, n, tile, how, *threshold);
  keep_marks(marks, tile, word);
}

constexpr int kScan = 1024;
constexpr int kEach = 8;

// Counts -> how many lie before. One block takes 8192 counts at a time.
__global__ void scan(Marks marks, int64_t blocks) {
  int64_t before = 0;
  for (int64_t start = 0; start < blocks; start += kScan * kEach) {
    const int64_t own = start + static_cast<int64_t>(threadIdx.x) * kEach;
    int64_t counts[kEach], sum = 0, total;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      counts[k] = own + k < blocks ? marks.before[own + k] : 0;
      sum += counts[k];
    }
    int64_t at = before + block_scan<kScan>(sum, &total);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (own + k < blocks)
        marks.before[own + k] = at;
      at += counts[k];
    }
    before += total;
  }
  if (threadIdx.x == 0)
    *marks.count = before;
}

__global__ void take(Marks marks, int64_t *out) {
  const int64_t first = tile_begin() + 32 * lane_id();
  uint32_t word = marks.words[first / 32];
  int total;
  int64_t at = marks.before[block_id()] + block_scan<kThreads>(__popc(word), &total);
  for (; word; word &= word - 1)
    out[at++] = first + __ffs(static_cast<int>(word)) - 1;
}

template <class Index>
__global__ void scatter(float *out, int64_t n, const Index *indices, const float *values,
                        int64_t k) {
  const int64_t i = thread_id();
  if (i >= k)
    return;
  const int64_t index = indices[i];
  assert(index >= 0 && index < n && "scatter_accumulate_: an index is outside of out");
  out[index] += values[i];
}

} // namespace

int64_t ck_cuda_select_workspace(int64_t n) {
  return (1 + blocks_for(n)) * static_cast<int64_t>(sizeof(int64_t)) +
         blocks_for(n) * (kBlockTile / 8);
}

int ck_cuda_select_at_least(const void *x, int dtype, int64_t n, const float *threshold,
                            void *workspace, void *stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Marks marks = marks_in(workspace, n);
  const int64_t blocks = blocks_for(n);
  if (blocks) {
    const int code = with_dtype(x, dtype, [&](auto from) -> int {
      return GPU_LAUNCH(mark, blocks, kThreads, queue, from, n, threshold, marks,
                        is_aligned<4>(from));
    });
    if (code)
      return code;
  }
  return GPU_LAUNCH(scan, 1, kScan, queue, marks, blocks);
}

int ck_cuda_correct_and_select(const void *g, int dtype, int64_t n, const float *velocity,
                               const float *unsent, float momentum, int nesterov,
                               const float *threshold, float *u, float *v, void *workspace,
                               void *stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Marks marks = marks_in(workspace, n);
  const Momentum how = {velocity, unsent, momentum, nesterov != 0, u, v};
  const int64_t blocks = blocks_for(n);
  if (blocks) {
    const int code = with_dtype(g, dtype, [&](auto from) -> int {
      return GPU_LAUNCH(correct_and_mark, blocks, kThreads, queue, from, n, how, threshold, marks,
                        is_aligned(how) && is_aligned<4>(from));
    });
    if (code)
      return code;
  }
  return GPU_LAUNCH(scan, 1, kScan, queue, marks, blocks);
}

int ck_cuda_take(const void *workspace, int64_t n, int64_t *out, void *stream) {
  if (n == 0)
    return 0;
  return GPU_LAUNCH(take, blocks_for(n), kThreads, static_cast<cudaStream_t>(stream),
                    marks_in(const_cast<void *>(workspace), n), out);
}

int ck_cuda_scatter_accumulate(float *out, int64_t n, const void *indices, int index_bytes,
                               const float *values, int64_t k, void *stream) {
  if (k == 0)
    return 0;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = blocks_of_threads(k);
  if (index_bytes == 4)
    return GPU_LAUNCH(scatter, blocks, kThreads, queue, out, n,
                      static_cast<const int32_t *>(indices), values, k);
  return GPU_LAUNCH(scatter, blocks, kThreads, queue, out, n, static_cast<const int64_t *>(indices),
                    values, k);
}
