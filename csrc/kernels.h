// The C interface: pointers, sizes and flags. Python binds it in commkit/ops/native.py, where the
// formats are defined by the reference; every function gives the same bits on any instruction set
// and any number of threads.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define COMMKIT_API extern "C" __attribute__((visibility("default")))
#else
#define COMMKIT_API extern "C"
#endif

// Bumped with every change of a signature below: a library left over from another build is not
// used.
constexpr int kInterface = 8;

// Dtypes of inputs.
enum CommkitDtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Codes of blocks. Ternary ones are only summed.
enum CommkitCode { kTernary = 2, kE3M0 = 3, kInt4 = 4, kInt8 = 8 };

COMMKIT_API int ck_interface();

// Uses the functions of one instruction set, "baseline", "avx2" or "avx512"; "" takes the best. 0:
// done; -1: this processor (or this build) lacks it, and nothing has changed.
COMMKIT_API int ck_select_level(const char *name);
COMMKIT_API const char *ck_level();

// Asks for huge pages under memory that has not been written yet.
COMMKIT_API void ck_prefer_huge_pages(void *start, int64_t bytes);

// bits: (n + 7) / 8 bytes. l1: the sum of |x|; null if not wanted.
COMMKIT_API void ck_encode_signs(const void *x, int dtype, int64_t n, uint8_t *bits, double *l1,
                                 int threads);

// out[i] = (accumulate ? out[i] : 0) + (scales[0] sgn_0[i] + scales[1] sgn_1[i] + ...), rows >= 1.
COMMKIT_API void ck_sum_signs(float *out, int64_t n, const uint8_t *const *bits,
                              const float *scales, int rows, int accumulate, int threads);

// Of `count` tensors at once, each with sizes[i] elements and dtypes[i]. The signs of one begin at the
// byte after those of the one before; scales[i] is the mean of |x|. With residuals, which may be null
// as `sent` may, they are those of sums[i] = residuals[i] (less sent[i] where it is not below 0, plus
// that where it is) * decay + x instead; a sum may be its residual.
COMMKIT_API void ck_foreach_encode_signs(uint8_t *bits, float *scales, const void *const *xs,
                                         const int *dtypes, const int64_t *sizes, int64_t count,
                                         const float *const *residuals, float *const *sums,
                                         float decay, const float *sent, int threads);

// ck_sum_signs into each of `count` tensors, of signs as ck_foreach_encode_signs leaves them; the
// scale of row r for tensor i is scales[r * count + i].
COMMKIT_API void ck_foreach_sum_signs(const float *scales, const uint8_t *const *bits, int rows,
                                      float *const *outs, const int64_t *sizes, int64_t count,
                                      int accumulate, int threads);

// The same sums, which go to no memory of their own, plus residuals[i] less sent[i] as above: these
// are sums[i], which are no residuals, and of them are bits and scales.
COMMKIT_API void ck_foreach_reencode_signs(uint8_t *bits, float *scales, const float *row_scales,
                                           const uint8_t *const *row_bits, int rows,
                                           const float *const *residuals, float *const *sums,
                                           const int64_t *sizes, int64_t count, const float *sent,
                                           int threads);

// One byte per element, -levels to levels, rounded at random; a scale is the 2-norm of a bucket, or its
// largest magnitude, over levels, of which there are up to 127.
COMMKIT_API void ck_quantize_buckets(const void *x, int dtype, int64_t n, int levels,
                                     int64_t bucket_size, int l2, const uint32_t *keys,
                                     int8_t *codes, float *scales, int threads);

// codes: n bytes of kInt8, else (n + 1) / 2, where block_size must be even. keys: the two of the
// noise, or null to round to nearest.
COMMKIT_API void ck_quantize_blocks(const void *x, int dtype, int64_t n, int code,
                                    int64_t block_size, const uint32_t *keys, uint8_t *codes,
                                    float *scales, int threads);

// As ck_sum_signs, with codes of blocks, each of which is divided by divisor; scales[r] has one
// float per block. Blocks begin at a byte.
COMMKIT_API void ck_sum_blocks(float *out, int64_t n, const uint8_t *const *codes,
                               const float *const *scales, int rows, int code, int64_t block_size,
                               int divisor, int accumulate, int threads);

// See reference.quantize_codebook: `count` levels, from 2 to 256; keys as above. -1: an element is
// not finite, and codes and scales are undefined.
COMMKIT_API int ck_quantize_codebook(const void *x, int dtype, int64_t n, const float *levels,
                                     int count, int64_t block_size, const uint32_t *keys,
                                     uint8_t *codes, float *scales, int threads);

// See reference.quantize_natural. -1: an element is not finite or above 2^127, and codes and top
// are undefined.
COMMKIT_API int ck_quantize_natural(const void *x, int dtype, int64_t n, const uint32_t *keys,
                                    uint8_t *codes, float *top, int threads);

// out[i] = levels[codes[i]] * scales[i / block_size], of 256 levels.
COMMKIT_API void ck_look_up(float *out, int64_t n, const uint8_t *codes, const float *levels,
                            const float *scales, int64_t block_size, int threads);

COMMKIT_API void ck_uniform_noise(float *out, int64_t n, const uint32_t *keys, int threads);

COMMKIT_API void ck_ternarize(const void *x, int dtype, int64_t n, float scale,
                              const uint32_t *keys, int8_t *codes, int threads);

// fields: 4 of 2 bits or 2 of 4 bits in a byte, each code + bias.
COMMKIT_API void ck_pack_ternary(const int8_t *codes, int64_t n, uint8_t *packed, int threads);
COMMKIT_API void ck_pack_nibbles(const int8_t *codes, int64_t n, uint8_t *packed, int threads);

// Indices, in rising order, of all |x| not below the threshold. Returns how many; they wait in
// *found for ck_take, which copies them to out and frees them. -1: out of memory.
COMMKIT_API int64_t ck_select_at_least(const void *x, int dtype, int64_t n, float threshold,
                                       void **found, int threads);
COMMKIT_API void ck_take(void *found, int64_t *out);

// The rank-th largest magnitude of x[first], x[first + stride] ..., NaN above all; 1 <= rank <= how
// many there are. -1: out of memory.
COMMKIT_API int ck_ranked_magnitude(const void *x, int dtype, int64_t n, int64_t first,
                                    int64_t stride, int64_t rank, float *out, int threads);

// places and values of the k largest magnitudes, as ck_largest_of_rows finds them of one row; n > 0,
// 1 <= k <= n. The rank-th largest of x[first], x[first + stride] ... and the group - 1 elements
// behind each is where the search begins; any will do, a good one saves time. -1: out of memory.
COMMKIT_API int ck_largest(const void *x, int dtype, int64_t n, int64_t first, int64_t stride,
                           int64_t group, int64_t rank, int64_t k, int64_t *places, float *values,
                           int threads);

// out: (rows, k) indices, rising in each row, of its k largest magnitudes; x: (rows, n), n > 0,
// 1 <= k <= n. -1: out of memory.
COMMKIT_API int ck_largest_of_rows(const void *x, int dtype, int64_t rows, int64_t n, int64_t k,
                                   int64_t *out, int threads);

// out[indices[i]] += values[i]; indices of index_bytes 4 or 8. -1: one is outside, and nothing was
// done.
COMMKIT_API int ck_scatter_accumulate(float *out, int64_t n, const void *indices, int index_bytes,
                                      const float *values, int64_t k);

// See reference.correct_momentum_. velocity and unsent may be null.
COMMKIT_API void ck_correct_momentum(const void *g, int dtype, int64_t n, const float *velocity,
                                     const float *unsent, float momentum, int nesterov, float *u,
                                     float *v, int threads);

// See reference.dgc_step_: places and values have room for k, 1 <= k <= n. The low_rank-th largest of
// the new v, sampled as by ck_largest, is where the search for the k largest begins, and what is
// above the high_rank-th (0: none) is taken to be among them; any will do, good ones save time. What
// is sent of a magnitude not above `negligible` is nothing, and its velocity stays. -1: out of
// memory, with u and v undefined.
COMMKIT_API int ck_dgc_step(const void *g, int dtype, int64_t n, const float *velocity,
                            const float *unsent, float momentum, int nesterov, int masking,
                            float negligible, int64_t first, int64_t stride, int64_t group,
                            int64_t low_rank, int64_t high_rank, int64_t k, float *u, float *v,
                            int64_t *places, float *values, int threads);

// See reference.frozen_adam_.
COMMKIT_API void ck_frozen_adam(float *p, float *exp_avg, const float *momentum,
                                const float *denominator, float keep, float size, int64_t n,
                                int threads);

// See reference.combine_tiles_: out is (rows * height, columns * width); places[r] and values[r]
// are (rows * columns, k), for count r. -1: a place is outside of a tile.
COMMKIT_API int ck_combine_tiles(float *out, int64_t rows, int64_t height, int64_t columns,
                                 int64_t width, const int16_t *const *places,
                                 const float *const *values, int count, int64_t k,
                                 const float *tall, const float *wide, int subtract, int threads);
