// A CUDA driver that launches nothing. Launches are counted; while a log is given, their arguments are copied to it.
// A CUfunction is a pointer to a `struct function`: the number of its parameters and the bytes of each.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cuda.h"

struct function {
  int32_t count;
  int32_t bytes[64];
};

static uint64_t launches;
static uint8_t *records;
static uint64_t room, used;

uint64_t fake_launches(void) { return launches; }

// Returns the bytes that were written to the log before.
uint64_t fake_log(void *buffer, uint64_t bytes) {
  uint64_t before = used;
  records = buffer, room = bytes, used = 0;
  return before;
}

static void put(const void *data, uint64_t bytes) {
  if (records != NULL && used + bytes <= room) {
    memcpy(records + used, data, bytes);
  }
  used += bytes;
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **parameters, void **extra) {
  ++launches;
  if (records != NULL) {
    const struct function *function = (const struct function *)kernel;
    uint64_t head[6] = {(uint64_t)kernel,   config->gridDimX,       config->gridDimY,
                        config->gridDimZ,   config->sharedMemBytes, (uint64_t)config->hStream};
    put(head, sizeof head);
    for (int index = 0; index < function->count; ++index) {
      uint64_t value = 0; // of a tensor map, its address
      memcpy(&value, parameters[index], function->bytes[index] < 8 ? function->bytes[index] : 8);
      put(&value, sizeof value);
    }
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

// A pointer is valid on the device, whatever it points to.
CUresult CUDAAPI cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                        const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                        const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                        CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  memcpy(map, &address, sizeof address);
  return CUDA_SUCCESS;
}

// What Triton's driver links to, and nobody calls.
#define UNUSED(name, ...) \
  CUresult CUDAAPI name(__VA_ARGS__) { return CUDA_ERROR_NOT_SUPPORTED; }

UNUSED(cuCtxGetDevice, CUdevice *device)
UNUSED(cuCtxGetLimit, size_t *value, CUlimit limit)
UNUSED(cuCtxSetCurrent, CUcontext context)
UNUSED(cuCtxSetLimit, CUlimit limit, size_t value)
UNUSED(cuDeviceGet, CUdevice *device, int ordinal)
UNUSED(cuDeviceGetAttribute, int *value, CUdevice_attribute attribute, CUdevice device)
UNUSED(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
UNUSED(cuFuncGetAttribute, int *value, CUfunction_attribute attribute, CUfunction function)
UNUSED(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
UNUSED(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
UNUSED(cuGetErrorString, CUresult error, const char **text)
UNUSED(cuModuleGetFunction, CUfunction *function, CUmodule module, const char *name)
UNUSED(cuModuleLoadData, CUmodule *module, const void *image)
UNUSED(cuModuleUnload, CUmodule module)
UNUSED(cuOccupancyMaxActiveClusters, int *count, CUfunction function, const CUlaunchConfig *config)
