/* A CUDA driver that does nothing: every call succeeds at once and no device is needed.

   It has what Triton's driver and our own launcher call. The last launch is remembered, so that
   tests can see what a kernel would have been given. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define MAX_BYTES 4096

typedef struct {
  uint64_t launches, function, stream;
  uint32_t grid[3], block[3], shared, bytes;
  uint8_t arguments[MAX_BYTES];
} Record;

Record null_record;
/* Bytes of each argument of the launches to come, ended by a zero; none: arguments are not kept. */
uint32_t null_sizes[64];

static CUresult launched(CUfunction f, const uint32_t grid[3], const uint32_t block[3],
                         uint32_t shared, CUstream stream, void **arguments) {
  Record *r = &null_record;
  r->launches += 1;
  r->function = (uint64_t)f;
  r->stream = (uint64_t)stream;
  memcpy(r->grid, grid, sizeof r->grid);
  memcpy(r->block, block, sizeof r->block);
  r->shared = shared;
  r->bytes = 0;
  for (int i = 0; null_sizes[i]; i++) {
    memcpy(r->arguments + r->bytes, arguments[i], null_sizes[i]);
    r->bytes += null_sizes[i];
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream,
                        void **arguments, void **extra) {
  (void)extra;
  return launched(f, (uint32_t[]){gx, gy, gz}, (uint32_t[]){bx, by, bz}, shared, stream, arguments);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  (void)extra;
  return launched(f, (uint32_t[]){c->gridDimX, c->gridDimY, c->gridDimZ},
                  (uint32_t[]){c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes,
                  c->hStream, arguments);
}

/* A tensor map that says what it was made of. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *base, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)steps, (void)interleave, (void)promotion, (void)fill;
  memset(map, 0, sizeof *map);
  uint64_t *words = (uint64_t *)map;
  words[0] = (uint64_t)base;
  words[1] = (uint64_t)type << 32 | rank << 8 | swizzle;
  for (cuuint32_t i = 0; i < rank; i++) {
    words[2 + i] = sizes[i];
    words[5 + i] = (uint64_t)box[i] << 32 | (i + 1 < rank ? strides[i] : 0);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *out, CUpointer_attribute what, CUdeviceptr pointer) {
  (void)what;
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

/* Handles are never followed, so any new number will do. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module, (void)name;
  static uintptr_t last;
  *function = (CUfunction)++last;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
  (void)function;
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) {
  (void)function, (void)what, (void)value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache how) {
  (void)function, (void)how;
  return CUDA_SUCCESS;
}

/* Shared memory of a Hopper, for whatever is asked. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  (void)what, (void)device;
  *value = 227 << 10;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  (void)error;
  *text = "an error of the null driver";
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext *context) { return (void)context, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(context);
}

/* Triton's driver is linked against these, and has no reason to call them. */
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, 1; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)value, (void)limit, 1; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, 1; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  return (void)n, (void)f, (void)c, 1;
}
