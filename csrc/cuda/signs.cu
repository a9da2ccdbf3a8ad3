// One bit per element.
#include "tile.h"

using namespace commkit;

namespace {

struct Rows {
  const uint8_t *bits[kMaxRows];
};

// Error feedback; without a residual there is none.
struct Feedback {
  const float *residual;
  float *sum; // may be residual
  float decay;
  const float *sent; // may be null
};

template <bool kWhole>
GPU_INLINE void compensate_tile(const Feedback &feedback, int64_t n, int64_t tile, Tile &v) {
  Tile residual;
  load_tile<kWhole>(feedback.residual, n, tile, residual);
  const float sent = feedback.sent ? *feedback.sent : 0.0f;
#pragma unroll
  for (int u = 0; u < kQuads; ++u)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (kWhole || quad_begin(tile, u) + k < n)
        v[u][k] = loops::compensated(residual[u][k], v[u][k], feedback.decay, sent);
  store_tile<kWhole>(feedback.sum, n, tile, v, false);
}

// Writes its signs; returns the thread's share of the sum of |v|.
template <bool kWhole>
GPU_INLINE double pack_tile(const Tile &v, int64_t n, int64_t tile, uint8_t *bits) {
  uint32_t nibbles[kQuads];
  double sum = 0;
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    nibbles[u] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = kWhole || quad_begin(tile, u) + k < n;
      nibbles[u] |= static_cast<uint32_t>(inside && v[u][k] >= 0) << k;
      sum += static_cast<double>(fabsf(v[u][k]));
    }
  }
  const uint32_t word = gather_word(nibbles);
  const int64_t at = tile / 8 + 4 * lane_id();
  if (kWhole)
    *reinterpret_cast<uint32_t *>(bits + at) = word;
  else
    store_bytes<4>(bits + at, word, (n + 7) / 8 - at);
  return sum;
}

template <bool kWhole, class T>
GPU_INLINE double encode_tile(const T *x, int64_t n, const Feedback &feedback, int64_t tile,
                              uint8_t *bits) {
  Tile v;
  load_tile<kWhole>(x, n, tile, v);
  if (feedback.residual)
    compensate_tile<kWhole>(feedback, n, tile, v);
  return pack_tile<kWhole>(v, n, tile, bits);
}

// Partial sums belong to blocks of a fixed size, and are added in a fixed order.
GPU_INLINE void keep_sum(double sum, double *sums) {
  __shared__ double warps[kWarps];
  sum = warp_sum(sum);
  if (lane_id() == 0)
    warps[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w)
      total += warps[w];
    sums[block_id()] = total;
  }
}

template <bool kSum, class T>
__global__ void encode(const T *x, int64_t n, Feedback feedback, uint8_t *bits, bool vectors,
                       double *sums) {
  const int64_t tile = tile_begin();
  double sum = 0;
  if (vectors && tile + kTile <= n)
    sum = encode_tile<true>(x, n, feedback, tile, bits);
  else if (tile < n)
    sum = encode_tile<false>(x, n, feedback, tile, bits);
  if (kSum)
    keep_sum(sum, sums);
}

constexpr int kFinish = 1024;

__global__ void finish_mean(const double *sums, int64_t count, int64_t n, float *mean) {
  __shared__ double warps[kFinish / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinish)
    sum += sums[i];
  sum = warp_sum(sum);
  if (lane_id() == 0)
    warps[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kFinish / kWarp; ++w)
      total += warps[w];
    *mean = static_cast<float>(total / static_cast<double>(n > 0 ? n : 1));
  }
}

template <bool kWhole>
GPU_INLINE void sum_rows(int64_t n, int64_t tile, const Rows &rows, const float *scales, int count,
                         Tile &sum) {
#pragma unroll
  for (int u = 0; u < kQuads; ++u)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      sum[u][k] = -0.0f; // what changes nothing, not even a zero's sign
  const int64_t at = tile / 8 + 4 * lane_id();
#pragma unroll 4
  for (int r = 0; r < count; ++r) {
    const uint8_t *row = rows.bits[r] + at;
    const uint32_t word =
        kWhole ? *reinterpret_cast<const uint32_t *>(row) : load_bytes<4>(row, (n + 7) / 8 - at);
    const uint32_t minus = loops::bits_of(-scales[r]);
#pragma unroll
    for (int u = 0; u < kQuads; ++u) {
      const uint32_t nibble = spread_word(word, u);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sum[u][k] += loops::float_of(minus ^ (nibble >> k << 31));
    }
  }
}

template <bool kWhole>
GPU_INLINE void sum_tile(float *out, int64_t n, int64_t tile, const Rows &rows, const float *scales,
                         int count, bool accumulate) {
  Tile sum;
  sum_rows<kWhole>(n, tile, rows, scales, count, sum);
  store_tile<kWhole>(out, n, tile, sum, accumulate);
}

template <bool kWhole>
GPU_INLINE double reencode_tile(int64_t n, const Rows &rows, const float *scales, int count,
                                const Feedback &feedback, int64_t tile, uint8_t *bits) {
  Tile v;
  sum_rows<kWhole>(n, tile, rows, scales, count, v);
  compensate_tile<kWhole>(feedback, n, tile, v);
  return pack_tile<kWhole>(v, n, tile, bits);
}

__global__ void reencode(int64_t n, Rows rows, const float *scales, int count, Feedback feedback,
                         uint8_t *bits, bool vectors, double *sums) {
  const int64_t tile = tile_begin();
  double sum = 0;
  if (vectors && tile + kTile <= n)
    sum = reencode_tile<true>(n, rows, scales, count, feedback, tile, bits);
  else if (tile < n)
    sum = reencode_tile<false>(n, rows, scales, count, feedback, tile, bits);
  keep_sum(sum, sums);
}

__global__ void sum(float *out, int64_t n, Rows rows, const float *scales, int count,
                    bool accumulate, bool vectors) {
  const int64_t tile = tile_begin();
  if (vectors && tile + kTile <= n)
    sum_tile<true>(out, n, tile, rows, scales, count, accumulate);
  else if (tile < n)
    sum_tile<false>(out, n, tile, rows, scales, count, accumulate);
}

} // namespace

int64_t ck_cuda_encode_signs_workspace(int64_t n) {
  return blocks_for(n) * static_cast<int64_t>(sizeof(double));
}

namespace {

int encode_all(const void *x, int dtype, int64_t n, const Feedback &feedback, uint8_t *bits,
               float *mean, void *workspace, void *stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto sums = static_cast<double *>(workspace);
  const int64_t blocks = blocks_for(n);
  if (blocks) {
    const int code = with_dtype(x, dtype, [&](auto from) -> int {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
      const bool vectors = is_aligned<4>(from) && is_aligned<4>(bits) &&
                           is_aligned<4>(feedback.residual) && is_aligned<4>(feedback.sum);
      if (mean)
        return GPU_LAUNCH((encode<true, T>), blocks, kThreads, queue, from, n, feedback, bits,
                          vectors, sums);
      return GPU_LAUNCH((encode<false, T>), blocks, kThreads, queue, from, n, feedback, bits,
                        vectors, sums);
    });
    if (code)
      return code;
  }
  return mean ? GPU_LAUNCH(finish_mean, 1, kFinish, queue, sums, blocks, n, mean) : 0;
}

} // namespace

int ck_cuda_encode_signs(const void *x, int dtype, int64_t n, uint8_t *bits, float *mean,
                         void *workspace, void *stream) {
  return encode_all(x, dtype, n, {}, bits, mean, workspace, stream);
}

int ck_cuda_encode_signs_compensated(const void *g, int dtype, int64_t n, const float *residual,
                                     float *sum, float decay, const float *sent, uint8_t *bits,
                                     float *mean, void *workspace, void *stream) {
  return encode_all(g, dtype, n, {residual, sum, decay, sent}, bits, mean, workspace, stream);
}

namespace {

// Copies their addresses; returns whether all are aligned.
bool take_rows(const uint8_t *const *bits, int rows, Rows &own) {
  bool aligned = true;
  for (int r = 0; r < rows; ++r) {
    own.bits[r] = bits[r];
    aligned = aligned && is_aligned<4>(bits[r]);
  }
  return aligned;
}

} // namespace

int ck_cuda_reencode_signs(float *sum, int64_t n, const uint8_t *const *row_bits,
                           const float *row_scales, int rows, const float *residual,
                           const float *sent, uint8_t *bits, float *mean, void *workspace,
                           void *stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto sums = static_cast<double *>(workspace);
  const int64_t blocks = blocks_for(n);
  if (blocks) {
    Rows own = {};
    const bool vectors = take_rows(row_bits, rows, own) && is_aligned<4>(bits) &&
                         is_aligned<4>(residual) && is_aligned<4>(sum);
    const Feedback feedback = {residual, sum, 1.0f, sent};
    const int code = GPU_LAUNCH(reencode, blocks, kThreads, queue, n, own, row_scales, rows,
                                feedback, bits, vectors, sums);
    if (code)
      return code;
  }
  return GPU_LAUNCH(finish_mean, 1, kFinish, queue, sums, blocks, n, mean);
}

int ck_cuda_sum_signs(float *out, int64_t n, const uint8_t *const *bits, const float *scales,
                      int rows, int accumulate, void *stream) {
  if (n == 0)
    return 0;
  Rows own = {};
  const bool vectors = take_rows(bits, rows, own) && is_aligned<4>(out);
  return GPU_LAUNCH(sum, blocks_for(n), kThreads, static_cast<cudaStream_t>(stream), out, n, own,
                    scales, rows, accumulate != 0, vectors);
}
