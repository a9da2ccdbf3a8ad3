// Small codes with one scale per block.
#include <cfloat>

#include "tile.h"

using namespace commkit;

namespace {

GPU_INLINE uint32_t magnitude(float x) { return loops::bits_of(x) & 0x7FFFFFFFu; }

__host__ __device__ constexpr int width_of(int code) { return code == kE3M0 ? 4 : code; }

// The scale to send of a block whose largest magnitude is `peak`.
template <int kCode> GPU_INLINE float scale_of(uint32_t peak) {
  const float largest = loops::float_of(peak);
  if (kCode == kE3M0)
    return largest;
  const float wanted = largest / (kCode == kInt8 ? 127.0f : 7.0f);
  return wanted < FLT_MIN ? 0.0f : wanted; // below, the reciprocal would be inf
}

// What its elements are multiplied by; of E3M0, divided by.
template <int kCode> GPU_INLINE float factor_of(float scale) {
  if (kCode == kE3M0)
    return scale > 0 ? scale : loops::float_of(0x7F800000u);
  return scale == 0 ? 0.0f : 1.0f / scale;
}

struct Noise {
  bool random; // else to nearest
  Keys keys;
};

GPU_INLINE float noise_at(int64_t i, const Noise &noise) {
  return loops::uniform(static_cast<uint32_t>(i), noise.keys.first, noise.keys.second);
}

GPU_INLINE uint32_t linear_field(float x, float inverse, float top, int64_t i, const Noise &noise) {
  if (!noise.random)
    return static_cast<uint32_t>(
        static_cast<int>(loops::nearest(loops::clamped(x * inverse, top))));
  const float y = loops::clamped(x * inverse + noise_at(i, noise), top);
  const int cut = static_cast<int>(y); // towards zero
  return static_cast<uint32_t>(cut - (static_cast<float>(cut) > y ? 1 : 0));
}

GPU_INLINE uint32_t e3m0_field(float x, float divisor, int64_t i, const Noise &noise) {
  const float y = fabsf(x) / divisor;
  const uint32_t bits = loops::bits_of(y);
  const bool graded = y >= 0x1p-6f;
  // y = 2^(code - 7) (1 + p), or below the first level p / 64
  const float p = graded ? loops::float_of((bits & 0x7FFFFFu) | 0x3F800000u) - 1.0f : 64.0f * y;
  const float limit = noise.random ? noise_at(i, noise) : 0.5f;
  const uint32_t size = (graded ? (bits >> 23) - 120 : 0) + (p > limit ? 1 : 0);
  return size | (x < 0 && size > 0 ? 8 : 0);
}

template <int kCode>
GPU_INLINE uint32_t field_of(float x, float factor, int64_t i, const Noise &noise) {
  if (kCode == kE3M0)
    return e3m0_field(x, factor, i, noise);
  if (kCode == kInt8)
    return linear_field(x, factor, 127.0f, i, noise) & 0xFFu;
  return (linear_field(x, factor, 7.0f, i, noise) + 8) & 15u;
}

// Blocks of a power of two, 4 to 1024, lie within a tile: one pass.
template <int kCode, bool kWhole, class T>
GPU_INLINE void quantize_tile(const T *x, int64_t n, int64_t tile, int shift, Noise noise,
                              uint8_t *codes, float *scales) {
  constexpr int kBits = width_of(kCode);
  Tile v;
  load_tile<kWhole>(x, n, tile, v);
  uint32_t peaks[kQuads];
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    peaks[u] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      peaks[u] = max(peaks[u], magnitude(v[u][k]));
  }
  const int block = 1 << shift;
  for (int mask = 1; mask < kWarp && 4 * mask < block; mask *= 2)
#pragma unroll
    for (int u = 0; u < kQuads; ++u)
      peaks[u] = max(peaks[u], from_xor(peaks[u], mask));
#pragma unroll
  for (int mask = 1; mask < kQuads; mask *= 2)
    if (kStep * mask < block) {
#pragma unroll
      for (int u = 0; u < kQuads; ++u)
        if (!(u & mask)) // both partners, which have the same by now, get the larger
          peaks[u] = peaks[u | mask] = max(peaks[u], peaks[u | mask]);
    }
#pragma unroll(kWhole ? kQuads : 1) // the last tile is rare: short code rather than fast
  for (int u = 0; u < kQuads; ++u) {
    const int64_t i = quad_begin(tile, u);
    const float scale = scale_of<kCode>(peaks[u]), factor = factor_of<kCode>(scale);
    if ((i & (block - 1)) == 0 && (kWhole || i < n))
      scales[i >> shift] = scale;
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (kWhole || i + k < n)
        bits |= field_of<kCode>(v[u][k], factor, i + k, noise) << (kBits * k);
    uint8_t *to = codes + i * kBits / 8;
    if (!kWhole)
      store_bytes<kBits / 2>(to, bits, (n * kBits + 7) / 8 - i * kBits / 8);
    else if (kBits == 8)
      *reinterpret_cast<uint32_t *>(to) = bits;
    else
      *reinterpret_cast<uint16_t *>(to) = static_cast<uint16_t>(bits);
  }
}

template <int kCode, class T>
__global__ void quantize(const T *x, int64_t n, int shift, Noise noise, uint8_t *codes,
                         float *scales, bool vectors) {
  const int64_t tile = tile_begin();
  if (vectors && tile + kTile <= n)
    quantize_tile<kCode, true>(x, n, tile, shift, noise, codes, scales);
  else if (tile < n)
    quantize_tile<kCode, false>(x, n, tile, shift, noise, codes, scales);
}

// Blocks of any other size take three passes. Maxima do not depend on the order of the atomics.
template <class T>
__global__ void find_peaks(const T *x, int64_t n, int64_t block_size, uint32_t *peaks) {
  const int64_t tile = tile_begin();
  if (tile >= n)
    return;
  const int64_t last = (tile + kTile < n ? tile + kTile : n) - 1;
  if (tile / block_size == last / block_size) {
    uint32_t peak = 0;
    for (int64_t i = tile + lane_id(); i <= last; i += kWarp)
      peak = max(peak, magnitude(widen(x[i])));
    for (int mask = 1; mask < kWarp; mask *= 2)
      peak = max(peak, from_xor(peak, mask));
    if (lane_id() == 0)
      atomicMax(peaks + tile / block_size, peak);
    return;
  }
  for (int64_t i = tile + lane_id(); i <= last; i += kWarp)
    atomicMax(peaks + i / block_size, magnitude(widen(x[i])));
}

template <int kCode> __global__ void finish_scales(float *scales, int64_t blocks) {
  const int64_t i = thread_id();
  if (i < blocks)
    scales[i] = scale_of<kCode>(loops::bits_of(scales[i]));
}

// One byte per thread: one code, or two of the same block.
template <int kCode, class T>
__global__ void encode(const T *x, int64_t n, int64_t block_size, Noise noise, uint8_t *codes,
                       const float *scales) {
  constexpr int kBits = width_of(kCode), kPerByte = 8 / kBits;
  const int64_t i = thread_id() * kPerByte;
  if (i >= n)
    return;
  const float factor = factor_of<kCode>(scales[i / block_size]);
  uint32_t bits = 0;
  for (int k = 0; k < kPerByte && i + k < n; ++k)
    bits |= field_of<kCode>(widen(x[i + k]), factor, i + k, noise) << (kBits * k);
  codes[i / kPerByte] = static_cast<uint8_t>(bits);
}

int shift_of(int64_t block_size) { // -1: no power of two
  int shift = 0;
  while (int64_t{1} << shift < block_size)
    ++shift;
  return int64_t{1} << shift == block_size ? shift : -1;
}

template <int kCode, class T>
int quantize_as(const T *x, int64_t n, int64_t block_size, const Noise &noise, uint8_t *codes,
                float *scales, cudaStream_t stream) {
  constexpr int kBits = width_of(kCode);
  const int shift = shift_of(block_size);
  if (shift >= 2 && block_size <= kTile)
    return GPU_LAUNCH((quantize<kCode, T>), blocks_for(n), kThreads, stream, x, n, shift, noise,
                      codes, scales, (is_aligned<4>(x) && is_aligned<kBits / 2>(codes)));
  const int64_t blocks = (n + block_size - 1) / block_size;
  int error = cudaMemsetAsync(scales, 0, static_cast<size_t>(blocks) * sizeof(float), stream);
  if (!error)
    error = GPU_LAUNCH(find_peaks, blocks_for(n), kThreads, stream, x, n, block_size,
                       reinterpret_cast<uint32_t *>(scales));
  if (!error)
    error = GPU_LAUNCH(finish_scales<kCode>, blocks_of_threads(blocks), kThreads, stream, scales,
                       blocks);
  if (!error)
    error = GPU_LAUNCH((encode<kCode, T>), blocks_of_threads((n * kBits + 7) / 8), kThreads, stream,
                       x, n, block_size, noise, codes, scales);
  return error;
}

constexpr int kOneBlock = 62; // the shift of a block that holds all

struct Rows {
  const uint8_t *codes[kMaxRows];
  const float *scales[kMaxRows];
};

struct Sum {
  float *out;
  int64_t n;
  int64_t block_size;
  int shift; // of the block size, used where `vectors`
  int rows;
  float divisor;
  float inverse; // used if not kDivide
  bool accumulate;
  bool vectors; // all is aligned, and no quad straddles blocks
};

// What the k-th code of these bits stands for, in units of its scale.
template <int kCode> GPU_INLINE float value_of(uint32_t bits, int k) {
  constexpr int kBits = width_of(kCode);
  const uint32_t field = bits >> (kBits * k) & ((1u << kBits) - 1);
  if (kCode == kE3M0) {
    const uint32_t size = field & 7;
    return loops::float_of(field >> 3 << 31 | (size ? (size + 120) << 23 : 0));
  }
  if (kCode == kInt8)
    return static_cast<float>(static_cast<int8_t>(field));
  return static_cast<float>(static_cast<int>(field) - (kCode == kInt4 ? 8 : 1));
}

template <bool kDivide> GPU_INLINE float share_of(float value, float scale, const Sum &sum) {
  return kDivide ? value * scale / sum.divisor : value * scale * sum.inverse;
}

// What changes nothing when something is added, not even a zero's sign.
constexpr float kNothing = -0.0f;

template <int kCode, bool kDivide>
GPU_INLINE void sum_tile(const Sum &sum, const Rows &rows, int64_t tile) {
  constexpr int kBits = width_of(kCode);
  Tile total;
#pragma unroll
  for (int u = 0; u < kQuads; ++u)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      total[u][k] = kNothing;
  for (int r = 0; r < sum.rows; ++r) {
    uint32_t bits[kQuads];
    float scales[kQuads];
#pragma unroll
    for (int u = 0; u < kQuads; ++u) {
      const int64_t i = quad_begin(tile, u);
      const uint8_t *from = rows.codes[r] + i * kBits / 8;
      if (kBits == 8)
        bits[u] = *reinterpret_cast<const uint32_t *>(from);
      else
        bits[u] = kBits == 4 ? *reinterpret_cast<const uint16_t *>(from) : *from;
      scales[u] = rows.scales[r][i >> sum.shift];
    }
#pragma unroll
    for (int u = 0; u < kQuads; ++u)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        total[u][k] += share_of<kDivide>(value_of<kCode>(bits[u], k), scales[u], sum);
  }
  store_tile<true>(sum.out, sum.n, tile, total, sum.accumulate);
}

// Any alignment, any block size.
template <int kCode, bool kDivide>
GPU_INLINE void sum_slowly(const Sum &sum, const Rows &rows, int64_t tile) {
  constexpr int kBits = width_of(kCode);
  for (int64_t i = tile + lane_id(); i < sum.n && i < tile + kTile; i += kWarp) {
    const int64_t at = i * kBits / 8, block = i / sum.block_size;
    float total = kNothing;
    for (int r = 0; r < sum.rows; ++r) {
      const float value = value_of<kCode>(rows.codes[r][at], static_cast<int>(i % (8 / kBits)));
      total += share_of<kDivide>(value, rows.scales[r][block], sum);
    }
    sum.out[i] = sum.accumulate ? sum.out[i] + total : total;
  }
}

template <int kCode, bool kDivide>
__global__ void __launch_bounds__(kThreads, kDivide ? 2 : 3) sum_blocks(Sum sum, Rows rows) {
  const int64_t tile = tile_begin();
  if (sum.vectors && tile + kTile <= sum.n)
    sum_tile<kCode, kDivide>(sum, rows, tile);
  else if (tile < sum.n)
    sum_slowly<kCode, kDivide>(sum, rows, tile);
}

template <int kCode> int sum_as(const Sum &sum, const Rows &rows, bool divide, void *stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = blocks_for(sum.n);
  return divide ? GPU_LAUNCH((sum_blocks<kCode, true>), blocks, kThreads, queue, sum, rows)
                : GPU_LAUNCH((sum_blocks<kCode, false>), blocks, kThreads, queue, sum, rows);
}

} // namespace

int ck_cuda_quantize_blocks(const void *x, int dtype, int64_t n, int code, int64_t block_size,
                            const uint32_t *keys, uint8_t *codes, float *scales, void *stream) {
  if (n == 0)
    return 0;
  const auto queue = static_cast<cudaStream_t>(stream);
  const Noise noise = {keys != nullptr, keys ? Keys{keys[0], keys[1]} : Keys{}};
  return with_dtype(x, dtype, [&](auto from) -> int {
    if (code == kInt8)
      return quantize_as<kInt8>(from, n, block_size, noise, codes, scales, queue);
    if (code == kE3M0)
      return quantize_as<kE3M0>(from, n, block_size, noise, codes, scales, queue);
    return quantize_as<kInt4>(from, n, block_size, noise, codes, scales, queue);
  });
}

int ck_cuda_sum_blocks(float *out, int64_t n, const uint8_t *const *codes,
                       const float *const *scales, int rows, int code, int64_t block_size,
                       int divisor, int accumulate, void *stream) {
  if (n == 0)
    return 0;
  const auto share = static_cast<float>(divisor);
  const int shift = block_size >= n ? kOneBlock : shift_of(block_size);
  Sum sum = {out, n, block_size, shift, rows, share, 1 / share, accumulate != 0, shift >= 2};
  sum.vectors = sum.vectors && is_aligned<4>(out);
  Rows own = {};
  for (int r = 0; r < rows; ++r) {
    own.codes[r] = codes[r];
    own.scales[r] = scales[r];
    const bool aligned = code == kInt8      ? is_aligned<4>(codes[r])
                         : code == kTernary ? true
                                            : is_aligned<2>(codes[r]);
    sum.vectors = sum.vectors && aligned;
  }
  // Multiplying by the reciprocal of a power of two is dividing by it.
  const bool divide = (divisor & (divisor - 1)) != 0;
  if (code == kInt8)
    return sum_as<kInt8>(sum, own, divide, stream);
  if (code == kE3M0)
    return sum_as<kE3M0>(sum, own, divide, stream);
  if (code == kTernary)
    return sum_as<kTernary>(sum, own, divide, stream);
  return sum_as<kInt4>(sum, own, divide, stream);
}
