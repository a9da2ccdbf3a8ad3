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
constexpr int kInterface = 1;

// Dtypes of inputs.
enum CommkitDtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

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

// codes: n bytes at 8 bits, (n + 1) / 2 at 4, where block_size must be even. keys: the two of the
// noise, or null to round to nearest.
COMMKIT_API void ck_quantize_blocks(const void *x, int dtype, int64_t n, int bits,
                                    int64_t block_size, const uint32_t *keys, uint8_t *codes,
                                    float *scales, int threads);

// As ck_sum_signs, with codes of blocks, each of which is divided by divisor; scales[r] has one
// float per block.
COMMKIT_API void ck_sum_blocks(float *out, int64_t n, const uint8_t *const *codes,
                               const float *const *scales, int rows, int bits, int64_t block_size,
                               int divisor, int accumulate, int threads);

COMMKIT_API void ck_uniform_noise(float *out, int64_t n, const uint32_t *keys, int threads);

COMMKIT_API void ck_ternarize(const void *x, int dtype, int64_t n, float scale,
                              const uint32_t *keys, int8_t *codes, int threads);

// fields: 4 of 2 bits or 2 of 4 bits in a byte, each code + bias.
COMMKIT_API void ck_pack_ternary(const int8_t *codes, int64_t n, uint8_t *packed, int threads);
COMMKIT_API void ck_unpack_ternary(const uint8_t *packed, int64_t n, float *out, int threads);
COMMKIT_API void ck_pack_nibbles(const int8_t *codes, int64_t n, uint8_t *packed, int threads);

// Indices, in rising order, of all |x| >= threshold. Returns how many; they wait in *found for
// ck_take, which copies them to out and frees them. -1: out of memory.
COMMKIT_API int64_t ck_select_at_least(const float *x, int64_t n, float threshold, void **found,
                                       int threads);
COMMKIT_API void ck_take(void *found, int64_t *out);

// out[indices[i]] += values[i]; indices of index_bytes 4 or 8. -1: one is outside, and nothing was
// done.
COMMKIT_API int ck_scatter_accumulate(float *out, int64_t n, const void *indices, int index_bytes,
                                      const float *values, int64_t k);
