// Matrices in tiles, each given by a few of its coefficients.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "parallel.h"

using namespace commkit;

namespace {

// One tile's coefficients, of which most are zero.
class Sparse {
public:
  Sparse(int64_t height, int64_t width)
      : width_(width), coefficients_(height * width), holders_(height * width), used_(height) {}

  // The mean over the rows that hold a coefficient. False: a place is outside.
  bool set(const int16_t *const *places, const float *const *values, int rows, int64_t from,
           int64_t k) {
    const auto size = static_cast<int64_t>(coefficients_.size());
    std::fill(coefficients_.begin(), coefficients_.end(), 0.0f);
    std::fill(used_.begin(), used_.end(), char{0});
    for (int r = 0; r < rows; ++r)
      for (int64_t i = from; i < from + k; ++i) {
        if (places[r][i] < 0 || places[r][i] >= size)
          return false;
        holders_[places[r][i]] = 0;
      }
    for (int r = 0; r < rows; ++r)
      for (int64_t i = from; i < from + k; ++i)
        holders_[places[r][i]] += values[r][i] != 0;
    for (int r = 0; r < rows; ++r)
      for (int64_t i = from; i < from + k; ++i) {
        const int64_t at = places[r][i];
        // divided first: the sum may not exist where the mean does
        coefficients_[at] += values[r][i] / static_cast<float>(std::max(holders_[at], 1));
        used_[at / width_] = 1;
      }
    return true;
  }

  bool used(int64_t row) const { return used_[row]; }
  const float *row(int64_t row) const { return coefficients_.data() + row * width_; }

private:
  int64_t width_;
  std::vector<float> coefficients_;
  std::vector<int> holders_;
  std::vector<char> used_;
};

} // namespace

int ck_combine_tiles(float *out, int64_t rows, int64_t height, int64_t columns, int64_t width,
                     const int16_t *const *places, const float *const *values, int count, int64_t k,
                     const float *tall, const float *wide, int subtract, int threads) {
  const Table &t = table();
  // Rows of whole groups of columns, so that loops over columns have one length.
  const int64_t stride = (width + kColumns - 1) / kColumns * kColumns;
  std::vector<float> padded(width * stride);
  for (int64_t j = 0; j < width; ++j)
    std::copy_n(wide + j * width, width, padded.data() + j * stride);
  std::atomic<bool> fine{true};
  parallel_for(rows * columns, height * width, threads, [&](int64_t begin, int64_t end) {
    Sparse sparse(height, width);
    std::vector<float> half(height * stride), lines(height * stride);
    std::vector<float> shares(height * std::max(height, width));
    std::vector<int32_t> which(width), in_order(height);
    std::iota(in_order.begin(), in_order.end(), 0);
    std::vector<int64_t> there;
    for (int64_t tile = begin; tile < end; ++tile) {
      if (!sparse.set(places, values, count, tile * k, k)) {
        fine = false;
        return;
      }
      // First the rows of coefficients that are there, times `wide`; then `tall` times these rows.
      there.clear();
      for (int64_t i = 0; i < height; ++i) {
        int64_t count = 0;
        for (int64_t j = 0; sparse.used(i) && j < width; ++j)
          if (sparse.row(i)[j] != 0) {
            shares[count] = sparse.row(i)[j];
            which[count++] = static_cast<int32_t>(j);
          }
        if (count) {
          float *to = half.data() + static_cast<int64_t>(there.size()) * stride;
          t.mix_rows(shares.data(), 1, which.data(), count, padded.data(), stride, to);
          there.push_back(i);
        }
      }
      const auto count = static_cast<int64_t>(there.size());
      for (int64_t r = 0; r < height; ++r)
        for (int64_t i = 0; i < count; ++i)
          shares[r * count + i] = tall[there[i] * height + r];
      t.mix_rows(shares.data(), height, in_order.data(), count, half.data(), stride, lines.data());
      float *to = out + tile / columns * height * columns * width + tile % columns * width;
      for (int64_t r = 0; r < height; ++r, to += columns * width) {
        const float *line = lines.data() + r * stride;
        if (subtract)
          for (int64_t c = 0; c < width; ++c)
            to[c] -= line[c];
        else
          std::copy_n(line, width, to);
      }
    }
  });
  return fine ? 0 : -1;
}
