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

} // namespace

void ck_foreach_encode_signs(uint8_t *bits, float *scales, const void *const *xs, const int *dtypes,
                             const int64_t *sizes, int64_t count, const float *const *residuals,
                             float *const *sums, float decay, const float *sent, int threads) {
  const Table &t = table();
  const Chunks chunks(sizes, count);
  // Partial sums belong to chunks, not to threads, and are added in order.
  std::vector<double> l1(chunks.size());
  chunks.each(threads, [&](int64_t i, int64_t begin, int64_t end, int64_t byte) {
    const float taken = sent ? sent[i] : 0.0f; // and taking nothing changes not a bit
    Input(xs[i], dtypes[i], t).each(begin, end, [&](const float *piece, int64_t at, int64_t n) {
      uint8_t *to = bits + byte + (at - begin) / 8;
      l1[chunks.first(i) + at / kChunk] =
          residuals
              ? t.compensate_and_encode(residuals[i] + at, piece, sums[i] + at, n, decay, taken, to)
              : t.encode_signs(piece, n, to);
    });
  });
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < chunks.size(i); ++c)
      sum += l1[chunks.first(i) + c];
    scales[i] = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(sizes[i], 1)));
  }
}

void ck_foreach_sum_signs(const float *scales, const uint8_t *const *bits, int rows,
                          float *const *outs, const int64_t *sizes, int64_t count, int accumulate,
                          int threads) {
  const Table &t = table();
  const Chunks chunks(sizes, count);
  chunks.each(threads, [&](int64_t i, int64_t begin, int64_t end, int64_t byte) {
    std::vector<const uint8_t *> own(rows);
    std::vector<float> size(rows);
    for (int r = 0; r < rows; ++r) {
      own[r] = bits[r] + byte;
      size[r] = scales[r * count + i];
    }
    t.sum_signs(outs[i] + begin, end - begin, own.data(), size.data(), rows, accumulate != 0);
  });
}
