// What CUDA and HIP (and the tests' emulation on a CPU) have under different names. Kernels use
// nothing beyond this page: no inline assembly, and no warp wider than 32 lanes.
#pragma once

#include <cstdint>

#if defined(COMMKIT_EMULATION)
#include "emulation.h"
#elif defined(__HIPCC__)
#include <cassert>
#include <hip/hip_runtime.h>

#define GPU_LAUNCH(kernel, blocks, threads, stream, ...)                                           \
  (kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(__VA_ARGS__), hipGetLastError())
using cudaStream_t = hipStream_t;
using cudaError_t = hipError_t;
using cudaFuncAttributes = hipFuncAttributes;
constexpr hipError_t cudaSuccess = hipSuccess;
#define cudaFuncGetAttributes hipFuncGetAttributes
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaMemsetAsync hipMemsetAsync
#else
#include <cassert>
#include <cuda_runtime.h>

#define GPU_LAUNCH(kernel, blocks, threads, stream, ...)                                           \
  (kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(__VA_ARGS__), cudaGetLastError())
#endif

#include "../loops.h"

#define GPU_INLINE static __device__ __forceinline__

namespace commkit {

constexpr int kWarp = 32;

// Among the 32 lanes of the caller's warp, all of which must call. HIP's wavefronts of 64 are two
// such warps.
#if defined(__HIPCC__)
template <class T> GPU_INLINE T from_lane(T x, int lane) { return __shfl(x, lane, kWarp); }
template <class T> GPU_INLINE T from_xor(T x, int mask) { return __shfl_xor(x, mask, kWarp); }
template <class T> GPU_INLINE T from_below(T x, int by) { return __shfl_up(x, by, kWarp); }
#else
template <class T> GPU_INLINE T from_lane(T x, int lane) {
  return __shfl_sync(0xFFFFFFFFu, x, lane);
}
template <class T> GPU_INLINE T from_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
template <class T> GPU_INLINE T from_below(T x, int by) {
  return __shfl_up_sync(0xFFFFFFFFu, x, by);
}
#endif

} // namespace commkit
