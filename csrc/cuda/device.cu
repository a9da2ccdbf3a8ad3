// The library itself.
#include "kernels.h"
#include "portable.h"

namespace {

__global__ void nothing() {}

} // namespace

int ck_cuda_interface() { return kCudaInterface; }
int ck_cuda_max_rows() { return kMaxRows; }

const char *ck_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int ck_cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, nothing);
  if (code != cudaSuccess)
    cudaGetLastError(); // or the next launch would report it
  return code;
}
