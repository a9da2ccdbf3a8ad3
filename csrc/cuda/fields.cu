// Random numbers, and small integers, several to a byte.
#include "tile.h"

using namespace commkit;

namespace {

GPU_INLINE float uniform(int64_t i, Keys keys) {
  return loops::uniform(static_cast<uint32_t>(i), keys.first, keys.second);
}

__global__ void noise(float *out, int64_t n, Keys keys, bool vectors) {
  const int64_t tile = tile_begin();
  if (tile >= n)
    return;
  Tile v;
#pragma unroll
  for (int u = 0; u < kQuads; ++u)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      v[u][k] = uniform(quad_begin(tile, u) + k, keys);
  if (vectors && tile + kTile <= n)
    store_tile<true>(out, n, tile, v, false);
  else
    store_tile<false>(out, n, tile, v, false);
}

template <bool kWhole, class T>
GPU_INLINE void ternarize_tile(const T *x, int64_t n, int64_t tile, float divisor, Keys keys,
                               int8_t *codes) {
  Tile v;
  load_tile<kWhole>(x, n, tile, v);
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    const int64_t i = quad_begin(tile, u);
    Vector<int8_t, 4> own;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool kept = uniform(i + k, keys) < fabsf(v[u][k]) / divisor;
      own.at[k] = static_cast<int8_t>(kept ? (v[u][k] > 0) - (v[u][k] < 0) : 0);
    }
    if (kWhole)
      store<4>(codes + i, own);
    else
      for (int k = 0; k < 4; ++k)
        if (i + k < n)
          codes[i + k] = own.at[k];
  }
}

template <class T>
__global__ void ternarize(const T *x, int64_t n, const float *scale, Keys keys, int8_t *codes,
                          bool vectors) {
  const int64_t tile = tile_begin();
  const float divisor = *scale > 0 ? *scale : 1.0f;
  if (vectors && tile + kTile <= n)
    ternarize_tile<true>(x, n, tile, divisor, keys, codes);
  else if (tile < n)
    ternarize_tile<false>(x, n, tile, divisor, keys, codes);
}

constexpr int kPack = 16; // codes per thread

// Fields of kBits, each code + kBias.
template <int kBits, int kBias>
__global__ void pack(const int8_t *codes, int64_t n, uint8_t *packed, bool vectors) {
  constexpr int kBytes = kPack * kBits / 8;
  const int64_t i = thread_id() * kPack;
  if (i >= n)
    return;
  const bool whole = vectors && i + kPack <= n;
  Vector<int8_t, kPack> own = {};
  if (whole)
    own = load<kPack>(codes + i);
  else
    for (int k = 0; k < kPack && i + k < n; ++k)
      own.at[k] = codes[i + k];
  Vector<uint8_t, kBytes> bytes = {};
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const int field = (own.at[k] + kBias) & ((1 << kBits) - 1);
    if (whole || i + k < n)
      bytes.at[k * kBits / 8] |= static_cast<uint8_t>(field << (k * kBits % 8));
  }
  uint8_t *to = packed + i * kBits / 8;
  if (whole)
    store<kBytes>(to, bytes);
  else
    for (int k = 0; k < kBytes && 8 * k < (n - i) * kBits; ++k)
      to[k] = bytes.at[k];
}

template <int kBits, int kBias>
int pack_as(const int8_t *codes, int64_t n, uint8_t *packed, void *stream) {
  if (n == 0)
    return 0;
  const bool vectors = is_aligned<kPack>(codes) && is_aligned<kPack * kBits / 8>(packed);
  return GPU_LAUNCH((pack<kBits, kBias>), blocks_of_threads((n + kPack - 1) / kPack), kThreads,
                    static_cast<cudaStream_t>(stream), codes, n, packed, vectors);
}

} // namespace

int ck_cuda_uniform_noise(float *out, int64_t n, const uint32_t *keys, void *stream) {
  if (n == 0)
    return 0;
  return GPU_LAUNCH(noise, blocks_for(n), kThreads, static_cast<cudaStream_t>(stream), out, n,
                    (Keys{keys[0], keys[1]}), is_aligned<4>(out));
}

int ck_cuda_ternarize(const void *x, int dtype, int64_t n, const float *scale, const uint32_t *keys,
                      int8_t *codes, void *stream) {
  if (n == 0)
    return 0;
  return with_dtype(x, dtype, [&](auto from) -> int {
    return GPU_LAUNCH(ternarize, blocks_for(n), kThreads, static_cast<cudaStream_t>(stream), from,
                      n, scale, (Keys{keys[0], keys[1]}), codes,
                      is_aligned<4>(from) && is_aligned<4>(codes));
  });
}

int ck_cuda_pack_ternary(const int8_t *codes, int64_t n, uint8_t *packed, void *stream) {
  return pack_as<2, 1>(codes, n, packed, stream);
}
int ck_cuda_pack_nibbles(const int8_t *codes, int64_t n, uint8_t *packed, void *stream) {
  return pack_as<4, 8>(codes, n, packed, stream);
}
