// The largest elements.
#include "ranking.h"

using namespace commkit;

namespace {

constexpr int64_t kPerThread = 8;

GPU_INLINE void clear(uint32_t *counts) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
    counts[bin] = 0;
}

GPU_INLINE Found find(const uint32_t *counts, int passes, int64_t rank) {
  Found upto = {0, rank};
  for (int pass = 0; pass < passes; ++pass)
    upto = next_digit(counts + pass * kBins, pass, upto);
  return upto;
}

// Of x[0], x[stride], ..., `size` of them.
template <class T>
__global__ void count_digits(const T *x, int64_t stride, int64_t size, int64_t rank, int pass,
                             uint32_t *counts) {
  __shared__ uint32_t own[kBins];
  clear(own);
  const Found upto = find(counts, pass, rank);
  __syncthreads();
  for (int64_t j = 0; j < kPerThread; ++j) {
    const int64_t i = (block_id() * kPerThread + j) * kThreads + threadIdx.x;
    if (i < size)
      count_digit(own, pass, upto, order_of(widen(x[i * stride])));
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
    if (own[bin])
      atomicAdd(counts + pass * kBins + bin, own[bin]);
}

__global__ void write_found(const uint32_t *counts, int64_t rank, float *out) {
  const Found all = find(counts, kDigits, rank);
  if (threadIdx.x == 0)
    *out = loops::float_of(all.prefix);
}

// A block finds the k-th largest of its row, then takes what lies above it and the first ones that
// equal it.
template <class T> __global__ void largest(const T *x, int64_t n, int64_t k, int64_t *out) {
  __shared__ uint32_t counts[kBins];
  const T *row = x + block_id() * n;
  Found kth = {0, k};
  for (int pass = 0; pass < kDigits; ++pass) {
    clear(counts);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      count_digit(counts, pass, kth, order_of(widen(row[i])));
    __syncthreads();
    kth = next_digit(counts, pass, kth);
  }
  int64_t *to = out + block_id() * k;
  int64_t equals = 0; // those before this piece that equal the k-th
  for (int64_t start = 0; start < n; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const uint32_t order = i < n ? order_of(widen(row[i])) : 0;
    const bool above = i < n && order > kth.prefix, equal = i < n && order == kth.prefix;
    uint32_t all; // both counts in one
    const uint32_t before = block_scan<kThreads>((above ? 1u << 16 : 0u) | (equal ? 1u : 0u), &all);
    const int64_t equals_before = equals + (before & 0xFFFFu);
    if (above || (equal && equals_before < kth.rank))
      to[(before >> 16) + min(equals_before, kth.rank)] = i;
    to += all >> 16;
    equals += all & 0xFFFFu;
  }
}

} // namespace

int64_t ck_cuda_ranked_magnitude_workspace() { return kDigits * kBins * sizeof(uint32_t); }

int ck_cuda_ranked_magnitude(const void *x, int dtype, int64_t n, int64_t first, int64_t stride,
                             int64_t rank, float *out, void *workspace, void *stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto counts = static_cast<uint32_t *>(workspace);
  const int64_t size = (n - first + stride - 1) / stride;
  const int64_t blocks = (size + kPerThread * kThreads - 1) / (kPerThread * kThreads);
  int code = cudaMemsetAsync(counts, 0, kDigits * kBins * sizeof(uint32_t), queue);
  for (int pass = 0; pass < kDigits && !code; ++pass)
    code = with_dtype(x, dtype, [&](auto from) -> int {
      return GPU_LAUNCH(count_digits, blocks, kThreads, queue, from + first, stride, size, rank,
                        pass, counts);
    });
  return code ? code : GPU_LAUNCH(write_found, 1, kThreads, queue, counts, rank, out);
}

int ck_cuda_largest_of_rows(const void *x, int dtype, int64_t rows, int64_t n, int64_t k,
                            int64_t *out, void *stream) {
  if (rows == 0 || k == 0)
    return 0;
  return with_dtype(x, dtype, [&](auto from) -> int {
    return GPU_LAUNCH(largest, rows, kThreads, static_cast<cudaStream_t>(stream), from, n, k, out);
  });
}
