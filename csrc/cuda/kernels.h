// The C interface of the GPU kernels: ../kernels.h with device pointers and a stream in place of
// threads. Everything runs on the stream given (a cudaStream_t), on the current device, and nothing
// waits for it. The result is a cudaError_t, 0 for success.
//
// Pointers are to device memory, except arrays of pointers and the two keys of the noise, which are
// read before a function returns. Workspaces need no initial contents and 16-byte alignment.
#pragma once

#include "../kernels.h"

// Bumped with every change of a signature below.
constexpr int kCudaInterface = 5;

// Rows that one call of a sum takes.
constexpr int kMaxRows = 128;

COMMKIT_API int ck_cuda_interface();
COMMKIT_API int ck_cuda_max_rows();
COMMKIT_API const char *ck_cuda_error(int code);
// 0: the current device can run these kernels.
COMMKIT_API int ck_cuda_probe();

// mean: the mean of |x|; null if not wanted, and then no workspace is either.
COMMKIT_API int64_t ck_cuda_encode_signs_workspace(int64_t n);
COMMKIT_API int ck_cuda_encode_signs(const void *x, int dtype, int64_t n, uint8_t *bits,
                                     float *mean, void *workspace, void *stream);

// The same of sum = (residual less its sign times *sent, which may be null) * decay + g, which is
// written; it may be residual. The mean is wanted.
COMMKIT_API int ck_cuda_encode_signs_compensated(const void *g, int dtype, int64_t n,
                                                 const float *residual, float *sum, float decay,
                                                 const float *sent, uint8_t *bits, float *mean,
                                                 void *workspace, void *stream);

// The same without decay, where g is the sum that ck_cuda_sum_signs would write, which goes to no
// memory of its own.
COMMKIT_API int ck_cuda_reencode_signs(float *sum, int64_t n, const uint8_t *const *row_bits,
                                       const float *row_scales, int rows, const float *residual,
                                       const float *sent, uint8_t *bits, float *mean,
                                       void *workspace, void *stream);

COMMKIT_API int ck_cuda_sum_signs(float *out, int64_t n, const uint8_t *const *bits,
                                  const float *scales, int rows, int accumulate, void *stream);

COMMKIT_API int ck_cuda_quantize_blocks(const void *x, int dtype, int64_t n, int code,
                                        int64_t block_size, const uint32_t *keys, uint8_t *codes,
                                        float *scales, void *stream);

COMMKIT_API int ck_cuda_sum_blocks(float *out, int64_t n, const uint8_t *const *codes,
                                   const float *const *scales, int rows, int code,
                                   int64_t block_size, int divisor, int accumulate, void *stream);

COMMKIT_API int ck_cuda_uniform_noise(float *out, int64_t n, const uint32_t *keys, void *stream);

COMMKIT_API int ck_cuda_ternarize(const void *x, int dtype, int64_t n, const float *scale,
                                  const uint32_t *keys, int8_t *codes, void *stream);

COMMKIT_API int ck_cuda_pack_ternary(const int8_t *codes, int64_t n, uint8_t *packed, void *stream);
COMMKIT_API int ck_cuda_pack_nibbles(const int8_t *codes, int64_t n, uint8_t *packed, void *stream);

// Marks all |x| not below *threshold in the workspace, whose first int64 becomes how many they are;
// ck_cuda_take then writes their indices, in rising order.
COMMKIT_API int64_t ck_cuda_select_workspace(int64_t n);
COMMKIT_API int ck_cuda_select_at_least(const void *x, int dtype, int64_t n, const float *threshold,
                                        void *workspace, void *stream);
COMMKIT_API int ck_cuda_take(const void *workspace, int64_t n, int64_t *out, void *stream);

// ck_cuda_correct_momentum, and ck_cuda_select_at_least of the new v, in one pass; for a step of Deep
// Gradient Compression.
COMMKIT_API int ck_cuda_correct_and_select(const void *g, int dtype, int64_t n,
                                           const float *velocity, const float *unsent,
                                           float momentum, int nesterov, const float *threshold,
                                           float *u, float *v, void *workspace, void *stream);

COMMKIT_API int64_t ck_cuda_ranked_magnitude_workspace();
COMMKIT_API int ck_cuda_ranked_magnitude(const void *x, int dtype, int64_t n, int64_t first,
                                         int64_t stride, int64_t rank, float *out, void *workspace,
                                         void *stream);

COMMKIT_API int ck_cuda_largest_of_rows(const void *x, int dtype, int64_t rows, int64_t n,
                                        int64_t k, int64_t *out, void *stream);

// An index outside stops the kernel with cudaErrorAssert, as torch's own indexing does. Indices do
// not repeat.
COMMKIT_API int ck_cuda_scatter_accumulate(float *out, int64_t n, const void *indices,
                                           int index_bytes, const float *values, int64_t k,
                                           void *stream);

COMMKIT_API int ck_cuda_correct_momentum(const void *g, int dtype, int64_t n, const float *velocity,
                                         const float *unsent, float momentum, int nesterov,
                                         float *u, float *v, void *stream);

COMMKIT_API int ck_cuda_frozen_adam(float *p, float *exp_avg, const float *momentum,
                                    const float *denominator, float keep, float size, int64_t n,
                                    void *stream);
