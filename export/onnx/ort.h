/* The part of ONNX Runtime's C interface that custom operators need, and a program that runs a graph, so that they build
 * without its headers.
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
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtBinding OrtBinding;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef void unused(void);

typedef struct {
  OrtStatus* (*CreateStatus)(int code, const char* message);
  unused* skipped1;
  const char* (*GetErrorMessage)(const OrtStatus* status);
  OrtStatus* (*CreateEnv)(int log_level, const char* name, OrtEnv** env);
  unused* skipped4[3];
  OrtStatus* (*CreateSession)(const OrtEnv* env, const char* path, const OrtSessionOptions* options,
                              OrtSession** session);
  unused* skipped8[2];
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions** options);
  unused* skipped11[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions* options, int threads); /* 0: as many as there are cores */
  unused* skipped25;
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtDomain* domain);
  OrtStatus* (*RegisterCustomOpsLibrary)(OrtSessionOptions* options, const char* path, void** handle);
  OrtStatus* (*SessionGetInputCount)(const OrtSession* session, size_t* count);
  unused* skipped31[2];
  OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession* session, size_t index, OrtTypeInfo** info);
  OrtStatus* (*SessionGetOutputTypeInfo)(const OrtSession* session, size_t index, OrtTypeInfo** info);
  unused* skipped35;
  OrtStatus* (*SessionGetInputName)(const OrtSession* session, size_t index, OrtAllocator* allocator, char** name);
  unused* skipped37[12];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo* memory, void* data, size_t bytes,
                                               const int64_t* sizes, size_t count, int type, OrtValue** value);
  unused* skipped50;
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  unused* skipped52[3];
  OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo* info, const OrtShapeInfo** shape);
  unused* skipped56[4];
  OrtStatus* (*GetTensorElementType)(const OrtShapeInfo* info, int* type);
  OrtStatus* (*GetDimensionsCount)(const OrtShapeInfo* info, size_t* count);
  OrtStatus* (*GetDimensions)(const OrtShapeInfo* info, int64_t* sizes, size_t count);
  unused* skipped63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtShapeInfo** info);
  unused* skipped66[3];
  OrtStatus* (*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo** info);
  unused* skipped70[8];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator** allocator);
  unused* skipped79[6];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* value);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* value);
  unused* skipped87[3];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t count,
                                        OrtValue** value);
  unused* skipped92[7];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtShapeInfo* info);
  unused* skipped100[33];
  OrtStatus* (*RunWithBinding)(OrtSession* session, const OrtRunOptions* options, const OrtBinding* binding);
  OrtStatus* (*CreateIoBinding)(OrtSession* session, OrtBinding** binding);
  unused* skipped135;
  OrtStatus* (*BindInput)(OrtBinding* binding, const char* name, const OrtValue* value);
  OrtStatus* (*BindOutput)(OrtBinding* binding, const char* name, const OrtValue* value);
  unused* skipped138[136];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void* data, size_t i),
                                          size_t count, size_t most_batches, void* data);
} OrtApi;

typedef struct {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase* OrtGetApiBase(void); /* of libonnxruntime */

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
