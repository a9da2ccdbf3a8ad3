// Just enough of CUDA to run the kernels of csrc/cuda on a CPU, for tests: a
// block's threads are fibers that change only at barriers and shuffles, blocks
// run one after another, and device memory is memory. It finds wrong results,
// unaligned vectors, and shuffles or barriers that some threads do not reach;
// not data races, and nothing about speed.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void *;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorAssert = 710;
struct cudaFuncAttributes {};

namespace emulation {

struct Index {
  unsigned x;
};

extern Index thread, block; // of the fiber that runs

cudaError_t launch(int64_t blocks, int threads,
                   const std::function<void()> &body);
void sync_block();
// Every lane gives 8 bytes and gets those of the lane it names.
uint64_t exchange(uint64_t mine, int from);
[[noreturn]] void stop(cudaError_t code);

template <class T> T shuffle(T mine, int from) {
  static_assert(sizeof(T) <= 8, "one register or two");
  uint64_t bytes = 0;
  std::memcpy(&bytes, &mine, sizeof mine);
  bytes = exchange(bytes, from & 31);
  std::memcpy(&mine, &bytes, sizeof mine);
  return mine;
}

inline int lane() { return static_cast<int>(thread.x % 32); }

} // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define GPU_LAUNCH(kernel, blocks, threads, stream, ...)                       \
  (static_cast<void>(stream),                                                  \
   emulation::launch(blocks, threads, [&] { (kernel)(__VA_ARGS__); }))
#undef assert
#define assert(condition)                                                      \
  ((condition) ? static_cast<void>(0) : emulation::stop(cudaErrorAssert))

inline void __syncthreads() { emulation::sync_block(); }
template <class T> T __shfl_sync(unsigned, T x, int lane) {
  return emulation::shuffle(x, lane);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::shuffle(x, emulation::lane() ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T x, int by) {
  return emulation::shuffle(x, emulation::lane() < by ? emulation::lane()
                                                      : emulation::lane() - by);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t atomicAdd(uint32_t *to, uint32_t x) { return (*to += x) - x; }
inline uint32_t atomicMax(uint32_t *to, uint32_t x) {
  const uint32_t old = *to;
  *to = std::max(old, x);
  return old;
}
using std::max;
using std::min;

inline const char *cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorAssert ? "device-side assert triggered"
         : code                  ? "error"
                                 : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes,
                                   cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
