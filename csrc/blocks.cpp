// Small codes with one scale per block.
#include <algorithm>
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

// The scale to send of a block whose largest magnitude is `peak`, and the rounding that goes with
// it.
class Rounding {
public:
  Rounding(const Table &table, int code, uint32_t peak, const uint32_t *keys)
      : table_(loops::float_of(peak) <= limits::max() ? table : baseline_table()), code_(code),
        keys_(keys) {
    const float largest = loops::float_of(peak);
    if (code == kE3M0) {
      scale = largest;
      factor_ = largest > 0 ? largest : limits::infinity();
      return;
    }
    top_ = code == kInt8 ? 127.0f : 7.0f;
    scale = largest / top_;
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
  int code_;
  const uint32_t *keys_;
  float factor_, top_ = 0;
};

class Quantizer {
public:
  Quantizer(const Input &input, const Table &table, int64_t n, int code, int64_t block_size,
            const uint32_t *keys, uint8_t *codes, float *scales)
      : input_(input), table_(table), n_(n), code_(code), block_size_(block_size), keys_(keys),
        codes_(codes), scales_(scales), stream_(bytes_before(n, code) >= kBytesBeyondCaches) {}

  // First all maxima and then all codes of blocks that fill one chunk, so that one does not wait
  // for another's division. Of more the memory would idle while codes are made.
  void few(int64_t first, int64_t last) const {
    alignas(32) float buffer[kChunk];
    uint32_t peaks[kChunk];
    const int64_t begin = first * block_size_, n = std::min(n_, last * block_size_) - begin;
    const float *x = input_.floats(begin, n, buffer);
    const auto size = [&](int64_t at) { return std::min(block_size_, n - at); };
    for (int64_t at = 0, i = 0; at < n; at += block_size_)
      peaks[i++] = table_.peak(x + at, size(at));
    for (int64_t at = 0, i = 0; at < n; at += block_size_, ++i) {
      const Rounding round(table_, code_, peaks[i], keys_);
      scales_[first + i] = round.scale;
      encode(round, x + at, begin + at, size(at));
    }
  }

  void one(int64_t block) const {
    const int64_t begin = block * block_size_, end = std::min(n_, begin + block_size_);
    uint32_t peak = 0;
    input_.each(begin, end, [&](const float *piece, int64_t, int64_t count) {
      peak = std::max(peak, table_.peak(piece, count));
    });
    const Rounding round(table_, code_, peak, keys_);
    scales_[block] = round.scale;
    input_.each(begin, end, [&](const float *piece, int64_t at, int64_t count) {
      encode(round, piece, at, count);
    });
  }

private:
  void encode(const Rounding &round, const float *x, int64_t at, int64_t n) const {
    alignas(32) int8_t buffer[kChunk];
    uint8_t *to = codes_ + bytes_before(at, code_);
    if (code_ == kInt8)
      return round(x, n, at, stream_, reinterpret_cast<int8_t *>(to));
    round(x, n, at, false, buffer);
    table_.pack_nibbles(buffer, n, to);
  }

  const Input &input_;
  const Table &table_;
  const int64_t n_;
  const int code_;
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
  const Quantizer quantizer(input, t, n, code, block_size, keys, codes, scales);
  const int64_t blocks = (n + block_size - 1) / block_size;
  const int64_t step = kChunk / block_size;
  parallel_for(blocks, block_size, threads, [&](int64_t begin, int64_t end) {
    if (step < 1)
      for (int64_t block = begin; block < end; ++block)
        quantizer.one(block);
    else
      for (int64_t block = begin; block < end; block += step)
        quantizer.few(block, std::min(end, block + step));
    t.drain();
  });
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
