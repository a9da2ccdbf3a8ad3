// One bit per element, of many tensors in one call.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "input.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

namespace {

// The chunks of all tensors, one after another.
class Chunks {
public:
  Chunks(const int64_t *sizes, int64_t count)
      : sizes_(sizes), chunks_(count + 1), bytes_(count + 1) {
    for (int64_t i = 0; i < count; ++i) {
      chunks_[i + 1] = chunks_[i] + (sizes[i] + kChunk - 1) / kChunk;
      bytes_[i + 1] = bytes_[i] + (sizes[i] + 7) / 8;
      elements_ += sizes[i];
    }
  }

  int64_t size() const { return chunks_.back(); }
  int64_t elements() const { return elements_; }
  // Of tensor i, and where they begin.
  int64_t size(int64_t i) const { return chunks_[i + 1] - chunks_[i]; }
  int64_t first(int64_t i) const { return chunks_[i]; }

  // visit(tensor, begin, end, byte) over runs of whole chunks of one tensor; its signs from element
  // `begin` on are at `byte`.
  template <class Visit> void each(int threads, const Visit &visit) const {
    if (size() == 0)
      return;
    parallel_for(size(), elements_ / size(), threads, [&](int64_t chunk, int64_t last) {
      auto i = std::upper_bound(chunks_.begin(), chunks_.end(), chunk) - chunks_.begin() - 1;
      for (; chunk < last; ++i) {
        const int64_t stop = std::min(last, chunks_[i + 1]);
        if (chunk == stop)
          continue; // an empty tensor
        const int64_t begin = (chunk - chunks_[i]) * kChunk;
        const int64_t end = std::min(sizes_[i], (stop - chunks_[i]) * kChunk);
        visit(i, begin, end, bytes_[i] + begin / 8);
        chunk = stop;
      }
    });
  }

private:
  const int64_t *sizes_;
  std::vector<int64_t> chunks_, bytes_; // before each tensor, and in all
  int64_t elements_ = 0;
};

// Of |x| of each tensor. Partial sums belong to chunks, not to threads, and are added in order.
class Means {
public:
  explicit Means(const Chunks &chunks) : chunks_(chunks), sums_(chunks.size()) {}

  // That of the chunk of tensor i which begins at element `at`.
  double &of(int64_t i, int64_t at) { return sums_[chunks_.first(i) + at / kChunk]; }

  void write(float *means, const int64_t *sizes, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < chunks_.size(i); ++c)
        sum += sums_[chunks_.first(i) + c];
      means[i] = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(sizes[i], 1)));
    }
  }

private:
  const Chunks &chunks_;
  std::vector<double> sums_;
};

// The signs and scales of one tensor in every row.
class Rows {
public:
  Rows(const uint8_t *const *bits, const float *scales, int rows, int64_t count, int64_t tensor)
      : bits_(bits), at_(rows), scales_(rows) {
    for (int r = 0; r < rows; ++r)
      scales_[r] = scales[r * count + tensor];
  }

  const float *scales() const { return scales_.data(); }
  // From this byte of every row on.
  const uint8_t *const *from(int64_t byte) {
    for (size_t r = 0; r < at_.size(); ++r)
      at_[r] = bits_[r] + byte;
    return at_.data();
  }

private:
  const uint8_t *const *bits_;
  std::vector<const uint8_t *> at_;
  std::vector<float> scales_;
};

} // namespace

void ck_foreach_encode_signs(uint8_t *bits, float *scales, const void *const *xs, const int *dtypes,
                             const int64_t *sizes, int64_t count, const float *const *residuals,
                             float *const *sums, float decay, const float *sent, int threads) {
  const Table &t = table();
  const Chunks chunks(sizes, count);
  const bool stream = residuals && chunks.elements() >= kBeyondCaches;
  Means means(chunks);
  chunks.each(threads, [&](int64_t i, int64_t begin, int64_t end, int64_t byte) {
    const float taken = sent ? sent[i] : 0.0f; // and taking nothing changes not a bit
    // In place, the lines are in the caches already.
    const bool elsewhere = stream && sums[i] != residuals[i];
    Input(xs[i], dtypes[i], t).each(begin, end, [&](const float *piece, int64_t at, int64_t n) {
      uint8_t *to = bits + byte + (at - begin) / 8;
      means.of(i, at) = residuals ? t.compensate_and_encode(residuals[i] + at, piece, sums[i] + at,
                                                            n, decay, taken, elsewhere, to)
                                  : t.encode_signs(piece, n, to);
    });
    if (elsewhere)
      t.drain();
  });
  means.write(scales, sizes, count);
}

void ck_foreach_reencode_signs(uint8_t *bits, float *scales, const float *row_scales,
                               const uint8_t *const *row_bits, int rows,
                               const float *const *residuals, float *const *sums,
                               const int64_t *sizes, int64_t count, const float *sent,
                               int threads) {
  const Table &t = table();
  const Chunks chunks(sizes, count);
  const bool stream = chunks.elements() >= kBeyondCaches;
  Means means(chunks);
  chunks.each(threads, [&](int64_t i, int64_t begin, int64_t end, int64_t byte) {
    const float taken = sent ? sent[i] : 0.0f;
    Rows of_tensor(row_bits, row_scales, rows, count, i);
    alignas(64) float decoded[kChunk];
    for (int64_t at = begin; at < end; at += kChunk) {
      const int64_t n = std::min(kChunk, end - at), from = byte + (at - begin) / 8;
      t.sum_signs(decoded, n, of_tensor.from(from), of_tensor.scales(), rows, false, false);
      means.of(i, at) = t.compensate_and_encode(residuals[i] + at, decoded, sums[i] + at, n, 1.0f,
                                                taken, stream, bits + from);
    }
    if (stream)
      t.drain();
  });
  means.write(scales, sizes, count);
}

void ck_foreach_sum_signs(const float *scales, const uint8_t *const *bits, int rows,
                          float *const *outs, const int64_t *sizes, int64_t count, int accumulate,
                          int threads) {
  const Table &t = table();
  const Chunks chunks(sizes, count);
  const bool stream = !accumulate && chunks.elements() >= kBeyondCaches;
  chunks.each(threads, [&](int64_t i, int64_t begin, int64_t end, int64_t byte) {
    Rows of_tensor(bits, scales, rows, count, i);
    t.sum_signs(outs[i] + begin, end - begin, of_tensor.from(byte), of_tensor.scales(), rows,
                accumulate != 0, stream);
    if (stream)
      t.drain();
  });
}
