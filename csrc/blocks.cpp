// Linear codes with one scale per block.
#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "loops.h"
#include "parallel.h"

using namespace commkit;

void ck_quantize_blocks(const void *x, int dtype, int64_t n, int bits, int64_t block_size,
                        const uint32_t *keys, uint8_t *codes, float *scales, int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const auto top = static_cast<float>((1 << (bits - 1)) - 1);
  const int64_t blocks = (n + block_size - 1) / block_size;
  const auto one = [&](int64_t block) {
    const int64_t begin = block * block_size, end = std::min(n, begin + block_size);
    uint32_t peak = 0;
    input.each(begin, end, kChunk, [&](const float *piece, int64_t, int64_t count) {
      peak = std::max(peak, t.peak(piece, count));
    });
    const float wanted = loops::float_of(peak) / top;
    const bool too_small = wanted < std::numeric_limits<float>::min();
    scales[block] = too_small ? 0.0f : wanted;
    const float inverse = too_small ? 0.0f : 1.0f / wanted;
    input.each(begin, end, kChunk, [&](const float *piece, int64_t at, int64_t count) {
      alignas(32) int8_t buffer[kChunk];
      int8_t *to = bits == 8 ? reinterpret_cast<int8_t *>(codes) + at : buffer;
      if (keys)
        t.round_randomly(piece, count, inverse, top, keys, static_cast<uint32_t>(at), to);
      else
        t.round_nearest(piece, count, inverse, top, to);
      if (bits == 4)
        t.pack_nibbles(buffer, count, codes + at / 2);
    });
  };
  parallel_for(blocks, block_size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      one(block);
  });
}

void ck_sum_blocks(float *out, int64_t n, const uint8_t *const *codes, const float *const *scales,
                   int rows, int bits, int64_t block_size, int divisor, int accumulate,
                   int threads) {
  const Table &t = table();
  const auto share = static_cast<float>(divisor);
  const int64_t blocks = (n + block_size - 1) / block_size;
  const auto piece = [&](int64_t block, int64_t at, int64_t count) {
    alignas(32) float sum[kChunk];
    alignas(32) int8_t buffer[kChunk];
    float *to = accumulate ? sum : out + at;
    for (int r = 0; r < rows; ++r) {
      const int8_t *own = reinterpret_cast<const int8_t *>(codes[r]) + at;
      if (bits == 4) {
        t.unpack_nibbles(codes[r] + at / 2, count, buffer);
        own = buffer;
      }
      (r == 0 ? t.scale_codes : t.add_scaled_codes)(own, count, scales[r][block], share, to);
    }
    if (accumulate)
      t.add(sum, count, out + at);
  };
  parallel_for(blocks, block_size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(n, (block + 1) * block_size);
      for (int64_t at = block * block_size; at < last; at += kChunk)
        piece(block, at, std::min(kChunk, last - at));
    }
  });
}
