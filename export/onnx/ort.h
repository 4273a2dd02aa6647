/* The part of ONNX Runtime's C interface that custom operators need, so that a library builds without its headers.
 *
 * ONNX Runtime hands out tables of functions. It only ever adds members at their end, so a table of version 17 has the
 * layout below in every later release. Members that are not used here are unnamed: skippedN. */
#ifndef ORT_H
#define ORT_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_VERSION = 17 }; /* the first with KernelContext_ParallelFor */
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_INT32 = 6, ORT_INT64 = 7 }; /* types of a tensor's elements */

typedef struct OrtStatus OrtStatus; /* NULL means success */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtShapeInfo OrtShapeInfo;
typedef struct OrtDomain OrtDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOp OrtCustomOp;
typedef void unused(void);

typedef struct {
  OrtStatus* (*CreateStatus)(int code, const char* message);
  unused* skipped1[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtDomain* domain);
  unused* skipped29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  unused* skipped52[9];
  OrtStatus* (*GetDimensionsCount)(const OrtShapeInfo* info, size_t* count);
  OrtStatus* (*GetDimensions)(const OrtShapeInfo* info, int64_t* sizes, size_t count);
  unused* skipped63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtShapeInfo** info);
  unused* skipped66[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* value);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* value);
  unused* skipped87[3];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t count,
                                        OrtValue** value);
  unused* skipped92[7];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtShapeInfo* info);
  unused* skipped100[174];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void* data, size_t i),
                                          size_t count, size_t most_batches, void* data);
} OrtApi;

typedef struct {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
  uint32_t version;
  unused* CreateKernel;
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op); /* NULL for the CPU */
  int (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  unused* KernelCompute;
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index); /* 0: required */
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp* op, size_t index); /* 0: where the provider's tensors are */
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  unused* InferOutputShape;
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
};

#endif
