// Small codes with one scale per block.
#include <algorithm>
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

// Bytes before element `at`, which is where a byte begins.
int64_t bytes_before(int64_t at, int code) {
  return code == kInt8 ? at : code == kTernary ? at / 4 : at / 2;
}

// How a block is coded: `top` is the largest code, for which the largest magnitude stands, or the 2-norm.
struct Grid {
  int code;
  float top;
  bool l2;
};

// Of a block, piece by piece. Size{} is that of none.
class Size {
public:
  void add(const Table &table, bool l2, const float *x, int64_t n) {
    if (l2)
      squares_ += table.sum_of_squares(x, n);
    else
      peak_ = std::max(peak_, table.peak(x, n));
  }

  double of(bool l2) const {
    return l2 ? std::sqrt(squares_) : static_cast<double>(loops::float_of(peak_));
  }

private:
  uint32_t peak_;
  double squares_;
};

// The scale to send of a block of this size, and the rounding that goes with it.
class Rounding {
public:
  Rounding(const Table &table, const Grid &grid, double size, const uint32_t *keys)
      : table_(std::isfinite(size) ? table : baseline_table()), code_(grid.code), top_(grid.top),
        keys_(keys) {
    if (code_ == kE3M0) {
      scale = static_cast<float>(size);
      factor_ = size > 0 ? scale : limits::infinity();
      return;
    }
    // A quotient of floats, where the size is one, is rounded once either way.
    scale = static_cast<float>(size / static_cast<double>(top_));
    const bool too_small = scale < limits::min(); // its reciprocal would be inf
    scale = too_small ? 0.0f : scale;
    factor_ = too_small ? 0.0f : 1.0f / scale;
  }

  void operator()(const float *x, int64_t n, int64_t at, bool stream, int8_t *codes) const {
    const auto first = static_cast<uint32_t>(at);
    if (code_ == kE3M0)
      table_.round_e3m0(x, n, factor_, keys_, first, codes);
    else if (keys_)
      table_.round_randomly(x, n, factor_, top_, keys_, first, stream, codes);
    else
      table_.round_nearest(x, n, factor_, top_, stream, codes);
  }

  float scale;

private:
  const Table &table_;
  const int code_;
  const float top_;
  const uint32_t *keys_;
  float factor_;
};

class Quantizer {
public:
  Quantizer(const Input &input, const Table &table, int64_t n, const Grid &grid, int64_t block_size,
            const uint32_t *keys, uint8_t *codes, float *scales)
      : input_(input), table_(table), n_(n), grid_(grid), block_size_(block_size), keys_(keys),
        codes_(codes), scales_(scales),
        stream_(bytes_before(n, grid.code) >= kBytesBeyondCaches) {}

  void operator()(int threads) const {
    const int64_t blocks = (n_ + block_size_ - 1) / block_size_;
    const int64_t step = kChunk / block_size_;
    parallel_for(blocks, block_size_, threads, [&](int64_t begin, int64_t end) {
      if (step < 1)
        for (int64_t block = begin; block < end; ++block)
          one(block);
      else
        for (int64_t block = begin; block < end; block += step)
          few(block, std::min(end, block + step));
      if (stream_)
        table_.drain();
    });
  }

private:
  // First all sizes and then all codes of blocks that fill one chunk, so that one does not wait for
  // another's division. Of more the memory would idle while codes are made.
  void few(int64_t first, int64_t last) const {
    alignas(32) float buffer[kChunk];
    Size sizes[kChunk];
    const int64_t begin = first * block_size_, n = std::min(n_, last * block_size_) - begin;
    const float *x = input_.floats(begin, n, buffer);
    const auto length = [&](int64_t at) { return std::min(block_size_, n - at); };
    for (int64_t at = 0, i = 0; at < n; at += block_size_)
      (sizes[i++] = Size{}).add(table_, grid_.l2, x + at, length(at));
    for (int64_t at = 0, i = 0; at < n; at += block_size_, ++i)
      encode(rounding(first + i, sizes[i]), x + at, begin + at, length(at));
  }

  void one(int64_t block) const {
    const int64_t begin = block * block_size_, end = std::min(n_, begin + block_size_);
    Size size{};
    input_.each(begin, end, [&](const float *piece, int64_t, int64_t count) {
      size.add(table_, grid_.l2, piece, count);
    });
    const Rounding round = rounding(block, size);
    input_.each(begin, end, [&](const float *piece, int64_t at, int64_t count) {
      encode(round, piece, at, count);
    });
  }

  Rounding rounding(int64_t block, const Size &size) const {
    const Rounding round(table_, grid_, size.of(grid_.l2), keys_);
    scales_[block] = round.scale;
    return round;
  }

  void encode(const Rounding &round, const float *x, int64_t at, int64_t n) const {
    alignas(32) int8_t buffer[kChunk];
    uint8_t *to = codes_ + bytes_before(at, grid_.code);
    if (grid_.code == kInt8)
      return round(x, n, at, stream_, reinterpret_cast<int8_t *>(to));
    round(x, n, at, false, buffer);
    table_.pack_nibbles(buffer, n, to);
  }

  const Input &input_;
  const Table &table_;
  const int64_t n_;
  const Grid grid_;
  const int64_t block_size_;
  const uint32_t *keys_;
  uint8_t *codes_;
  float *scales_;
  const bool stream_;
};

} // namespace

void ck_quantize_blocks(const void *x, int dtype, int64_t n, int code, int64_t block_size,
                        const uint32_t *keys, uint8_t *codes, float *scales, int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const Grid grid{code, code == kInt8 ? 127.0f : 7.0f, false};
  Quantizer(input, t, n, grid, block_size, keys, codes, scales)(threads);
}

void ck_quantize_buckets(const void *x, int dtype, int64_t n, int levels, int64_t bucket_size,
                         int l2, const uint32_t *keys, int8_t *codes, float *scales, int threads) {
  const Table &t = table();
  const Input input(x, dtype, t);
  const Grid grid{kInt8, static_cast<float>(levels), l2 != 0};
  Quantizer(input, t, n, grid, bucket_size, keys, reinterpret_cast<uint8_t *>(codes),
            scales)(threads);
}

void ck_sum_blocks(float *out, int64_t n, const uint8_t *const *codes, const float *const *scales,
                   int rows, int code, int64_t block_size, int divisor, int accumulate,
                   int threads) {
  const Table &t = table();
  const auto unpack = code == kTernary ? t.unpack_ternary : t.unpack_nibbles;
  const auto scale = code == kE3M0 ? t.scale_levels : t.scale_codes;
  const bool stream = !accumulate && n >= kBeyondCaches;
  const auto share = static_cast<float>(divisor);
  // Rows are added to one another before they are to out; one alone is added there at once.
  const bool apart = accumulate && rows > 1;
  // One block may be all there is; threads share it.
  const int64_t step = std::min(block_size, kChunk * ((kElementsPerThread + kChunk - 1) / kChunk));
  const auto piece = [&](int64_t block, int64_t at, int64_t count) {
    alignas(32) float sum[kChunk];
    alignas(32) int8_t buffer[kChunk];
    const float *start = accumulate && !apart ? out + at : nullptr;
    for (int r = 0; r < rows; ++r) {
      const uint8_t *own = codes[r] + bytes_before(at, code);
      if (code != kInt8)
        unpack(own, count, buffer);
      const bool last = r == rows - 1 && !apart;
      scale(code == kInt8 ? reinterpret_cast<const int8_t *>(own) : buffer, count, scales[r][block],
            share, r ? sum : start, stream && last, last ? out + at : sum);
    }
    if (apart)
      t.add(sum, count, out + at);
  };
  const int64_t per_block = (block_size + step - 1) / step;
  const int64_t blocks = (n + block_size - 1) / block_size;
  parallel_for(blocks * per_block, step, threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / per_block;
      const int64_t first = block * block_size + unit % per_block * step;
      const int64_t last = std::min({n, (block + 1) * block_size, first + step});
      for (int64_t at = first; at < last; at += kChunk)
        piece(block, at, std::min(kChunk, last - at));
    }
    if (stream)
      t.drain();
  });
}
