// What the runtime's tests call, as CANN's C interface, and how they fail.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "softnpu/acl/report.h"
#include "softnpu/acl/tensor.h"

extern "C" {
int aclInit(const char*);
int aclFinalize();
int aclrtGetDevice(int*);
int aclrtGetDeviceCount(uint32_t*);
int aclrtResetDevice(int);
int aclrtGetCurrentContext(void**);
int aclrtSetCurrentContext(void*);
int aclrtSetDevice(int);
int aclrtMalloc(void**, size_t, int);
int aclrtFree(void*);
int aclrtMemcpy(void*, size_t, const void*, size_t, int);
int aclrtMemcpyAsync(void*, size_t, const void*, size_t, int, void*);
int aclrtMemsetAsync(void*, size_t, int, size_t, void*);
int aclrtCreateStream(void**);
int aclrtDestroyStream(void*);
int aclrtSynchronizeStream(void*);
int aclrtSynchronizeStreamWithTimeout(void*, int);
int aclrtSynchronizeDevice();
int aclrtStreamQuery(void*, int*);
int aclrtCreateEventWithFlag(void**, uint32_t);
int aclrtCreateEventExWithFlag(void**, uint32_t);
int aclrtResetEvent(void*, void*);
int aclrtQueryEventStatus(void*, int*);
int aclrtQueryEventWaitStatus(void*, int*);
int aclrtEventElapsedTime(float*, void*, void*);
int aclrtDestroyEvent(void*);
int aclrtRecordEvent(void*, void*);
int aclrtStreamWaitEvent(void*, void*);
int aclrtSynchronizeEvent(void*);
int aclmdlRICaptureBegin(void*, int);
int aclmdlRICaptureEnd(void*, void**);
int aclmdlRIExecuteAsync(void*, void*);
int aclmdlRIDestroy(void*);
int aclmdlRICaptureGetInfo(void*, int*, void**);
int aclrtMallocHost(void**, size_t);
int aclrtFreeHost(void*);
int aclrtMemset(void*, size_t, int, size_t);
int aclrtReserveMemAddress(void**, size_t, size_t, void*, uint64_t);
int aclrtReleaseMemAddress(void*);
int aclrtMallocPhysical(void**, size_t, const void*, uint64_t);
int aclrtFreePhysical(void*);
int aclrtMapMem(void*, size_t, size_t, void*, uint64_t);
int aclrtUnmapMem(void*);
int aclmdlRICaptureThreadExchangeMode(int*);
size_t softnpu_statistics(char*, size_t);
int softnpu_check_red_zones();
aclTensor* aclCreateTensor(const int64_t*, uint64_t, int, const int64_t*, int64_t, int,
                           const int64_t*, uint64_t, void*);
int aclDestroyTensor(const aclTensor*);
int aclGetViewShape(const aclTensor*, int64_t**, uint64_t*);
aclTensorList* aclCreateTensorList(aclTensor* const*, uint64_t);
int aclDestroyTensorList(const aclTensorList*);
aclScalar* aclCreateScalar(void*, int);
int aclDestroyScalar(const aclScalar*);
aclIntArray* aclCreateIntArray(const int64_t*, uint64_t);
int aclDestroyIntArray(const aclIntArray*);
}

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, \
                   softnpu::last_message());                                   \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)

void before_initialisation();  // the first thing of the process
void refused_in_captures();
void refused_events();
void dead_handles();
void devices_that_were_reset();  // the last thing of the process
