// Our own declarations of the part of CANN's C ABI that the software device answers: widths, values
// and opaque handles only. Sources: integer widths and symbol names observed on the torch_npu
// wheel; error numbers from torch_npu's public (BSD-3) error table and CANN's published page
// "aclError".
#pragma once

#include <cstddef>
#include <cstdint>

#define SOFTNPU_C extern "C" __attribute__((visibility("default")))
#define SOFTNPU_CXX __attribute__((visibility("default")))

namespace softnpu {

enum Code : int {
  kOk = 0,
  kAclParameter = 100000,
  kNotInitialised = 100001,
  kAlreadyInitialised = 100002,
  kUnsupportedApi = 100024,
  kFinalisedAlready = 100037,
  kParameter = 107000,
  kDeviceId = 107001,
  kNoContext = 107002,
  kStreamContext = 107003,
  kEventTimestamp = 107006,
  kHandle = 107017,
  kTimeout = 107019,
  kCaptureDependency = 107024,
  kStreamUnjoined = 107025,
  kModelCaptured = 107026,
  kStreamCaptured = 107027,
  kEventCaptured = 107028,
  kStreamNotCaptured = 107029,
  kCaptureMode = 107030,
  kCaptureImplicit = 107031,
  kCaptureConflict = 107032,
  kCaptureUnmatched = 107036,
  kCaptureThread = 107038,
  kFeature = 207000,
  kOutOfMemory = 207001,
  kKernelFault = 507015,
  kReadOutOfBounds = 507042,
  kWriteOutOfBounds = 507043,
  kCaptureInvalidated = 507903,
  kNnNullptr = 161001,
  kNnParameter = 161002,
  kNnRuntime = 361001,
  kNnInner = 561000,
};

// aclDataType, value by value.
enum DType : int {
  kFloat = 0,
  kHalf = 1,
  kInt8 = 2,
  kInt32 = 3,
  kUint8 = 4,
  kInt16 = 6,
  kUint16 = 7,
  kUint32 = 8,
  kInt64 = 9,
  kUint64 = 10,
  kDouble = 11,
  kBool = 12,
  kComplex64 = 16,
  kComplex128 = 17,
  kBFloat16 = 27,
  kInt4 = 29,
  kComplex32 = 33,
  kFloat8E5M2 = 35,
  kFloat8E4M3 = 36,
  kFloat8E8M0 = 37,
  kFloat4E2M1 = 40,
};

// C0 of a tile (its width): 32 bytes in kFormatNz, that many values in the others.
enum Format : int {
  kFormatNd = 2,
  kFormatNz = 29,
  kFormatNzC0Is16 = 50,
  kFormatNzC0Is32 = 51,
  kFormatNzC0Is2 = 52,
  kFormatNzC0Is4 = 53,
  kFormatNzC0Is8 = 54
};
enum CopyKind : int {
  kHostToHost = 0,
  kHostToDevice = 1,
  kDeviceToHost = 2,
  kDeviceToDevice = 3,
  kCopyDefault = 4
};
enum CaptureMode : int { kCaptureGlobal = 0, kCaptureThreadLocal = 1, kCaptureRelaxed = 2 };
enum CaptureStatus : int { kCaptureNone = 0, kCaptureActive = 1, kCaptureInvalid = 2 };

using Handle = void*;

}  // namespace softnpu
