// Codes of a byte that are places in a table: of any levels, or of powers of two.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "loops.h"
#include "parallel.h"

using namespace commkit;

namespace {

using limits = std::numeric_limits<float>;

Codebook codebook(const float *levels, int count, bool random) {
  Codebook book;
  book.count = count;
  book.random = random;
  for (int i = 0; i < Codebook::kMost; ++i) {
    book.levels[i] = i < count ? levels[i] : limits::infinity();
    const bool between = i + 1 < count;
    const float middle = between ? (levels[i + 1] + levels[i]) / 2 : limits::infinity();
    book.bounds[i] = random ? book.levels[i] : middle;
  }
  return book;
}

float float_of_ordered(int32_t key) {
  return loops::float_of(static_cast<uint32_t>(loops::ordered(key)));
}

class Encoder {
public:
  Encoder(const Input &input, const Table &table, const Codebook &book, int64_t n,
          int64_t block_size, const uint32_t *keys, uint8_t *codes, float *scales)
      : input_(input), table_(table), book_(book), n_(n), block_size_(block_size), keys_(keys),
        codes_(codes), scales_(scales) {}

  // Whether all of the block is finite; else nothing has been written.
  bool operator()(int64_t block) const {
    const int64_t begin = block * block_size_, end = std::min(n_, begin + block_size_);
    // What the last block lacks is zeros.
    const bool padded = end - begin < block_size_;
    int32_t low = padded ? 0 : std::numeric_limits<int32_t>::max();
    int32_t high = padded ? 0 : std::numeric_limits<int32_t>::min();
    input_.each(begin, end, [&](const float *piece, int64_t, int64_t count) {
      table_.extremes(piece, count, &low, &high);
    });
    const float least = float_of_ordered(low), most = float_of_ordered(high);
    if (!std::isfinite(least) || !std::isfinite(most))
      return false;
    // Plus zero: of two zeros, the positive one.
    const float scale =
        std::max(most / book_.levels[book_.count - 1], least / book_.levels[0]) + 0.0f;
    scales_[block] = scale;
    const float divisor = scale > 0 ? scale : limits::infinity();
    input_.each(begin, end, [&](const float *piece, int64_t at, int64_t count) {
      table_.round_to_levels(piece, count, divisor, book_, keys_, static_cast<uint32_t>(at),
                             codes_ + at);
    });
    return true;
  }

private:
  const Input &input_;
  const Table &table_;
  const Codebook &book_;
  const int64_t n_, block_size_;
  const uint32_t *keys_;
  uint8_t *codes_;
  float *scales_;
};

// The largest magnitude of all, as its bits.
uint32_t largest(const Input &input, const Table &t, int64_t n, int threads) {
  std::atomic<uint32_t> peak{0};
  parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
    uint32_t own = 0;
    input.each(begin, end, [&](const float *piece, int64_t, int64_t count) {
      own = std::max(own, t.peak(piece, count));
    });
    uint32_t seen = peak.load();
    while (seen < own && !peak.compare_exchange_weak(seen, own)) {
    }
  });
  return peak.load();
}

} // namespace

int ck_quantize_codebook(const void *x, int dtype, int64_t n, const float *levels, int count,
                         int64_t block_size, const uint32_t *keys, uint8_t *codes, float *scales,
                         int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const Codebook book = codebook(levels, count, keys != nullptr);
  const Encoder encode(input, t, book, n, block_size, keys, codes, scales);
  std::atomic<bool> finite{true};
  const int64_t blocks = (n + block_size - 1) / block_size;
  parallel_for(blocks, block_size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end && finite; ++block)
      if (!encode(block))
        finite = false;
  });
  return finite ? 0 : -1;
}

int ck_quantize_natural(const void *x, int dtype, int64_t n, const uint32_t *keys, uint8_t *codes,
                        float *top, int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const float peak = loops::float_of(largest(input, t, n, threads));
  if (!(peak <= 0x1p127f))
    return -1;
  int exponent = 0; // of the smallest power of two that is not below the peak
  if (std::frexp(peak, &exponent) == 0.5f)
    --exponent;
  *top = peak > 0 ? std::ldexp(1.0f, exponent) : 0.0f;
  parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
    input.each(begin, end, [&](const float *piece, int64_t at, int64_t count) {
      t.round_to_powers(piece, count, exponent + 127, keys, static_cast<uint32_t>(at), codes + at);
    });
  });
  return 0;
}

void ck_look_up(float *out, int64_t n, const uint8_t *codes, const float *levels,
                const float *scales, int64_t block_size, int threads) {
  const Table &t = table();
  // One block may be all there is; threads share it.
  parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t block = at / block_size;
      const int64_t count = std::min(end, (block + 1) * block_size) - at;
      t.look_up(codes + at, count, levels, scales[block], out + at);
      at += count;
    }
  });
}
