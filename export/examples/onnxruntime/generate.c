/* Continues a text with a byte-level export: generate DIRECTORY TEXT BYTES [THREADS]. It takes the most probable byte
 * each time. ramnet.json has the threads of a tuned export under "deployment"; by default, there is one for each core.
 *
 * An export with kernels holds a library, whose code is run: use it only if you trust where it comes from. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ort.h" /* or ONNX Runtime's own header */

enum { VOCABULARY = 256, MOST_AXES = 8 };

static const OrtApi* api;
static OrtMemoryInfo* cpu;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  exit(1);
}

static OrtValue* tensor(void* data, size_t bytes, const int64_t* sizes, size_t axes, int type) {
  OrtValue* value;
  check(api->CreateTensorWithDataAsOrtValue(cpu, data, bytes, sizes, axes, type, &value));
  return value;
}

/* Get the sizes of a tensor for one sequence. Returns the number of its elements. */
static size_t sizes_of(const OrtTypeInfo* info, int64_t* sizes, size_t* axes, int* type) {
  const OrtShapeInfo* shape;
  size_t count = 1;
  check(api->CastTypeInfoToTensorInfo(info, &shape));
  check(api->GetTensorElementType(shape, type));
  check(api->GetDimensionsCount(shape, axes));
  if (*axes > MOST_AXES) exit(1);
  check(api->GetDimensions(shape, sizes, *axes));
  for (size_t i = 0; i < *axes; i++) count *= (size_t)(sizes[i] = sizes[i] < 0 ? 1 : sizes[i]);
  return count;
}

/* Bind a tensor of the state before the first token as input and as output of the graph: zeros, but 1/M in a mass. A
 * token then copies no memory. Every layer reads the position, which needs another buffer for the output. */
static void bind_state(OrtBinding* binding, const char* past, const OrtTypeInfo* info, int64_t position[2]) {
  int64_t sizes[MOST_AXES];
  size_t axes;
  int type;
  char present[64];
  const size_t count = sizes_of(info, sizes, &axes, &type);
  snprintf(present, sizeof present, "present_%s", past + strlen("past_"));
  if (type == ORT_INT64) {
    check(api->BindInput(binding, past, tensor(&position[0], sizeof *position, sizes, axes, type)));
    check(api->BindOutput(binding, present, tensor(&position[1], sizeof *position, sizes, axes, type)));
    return;
  }
  float* data = calloc(count, sizeof *data);
  if (data == NULL) exit(1);
  if (strstr(past, ".mass.") != NULL)
    for (size_t i = 0; i < count; i++) data[i] = 1.0f / (float)sizes[2];
  OrtValue* value = tensor(data, count * sizeof *data, sizes, axes, type);
  check(api->BindInput(binding, past, value));
  check(api->BindOutput(binding, present, value));
}

int main(int count, char** arguments) {
  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* decode;
  OrtBinding* binding;
  OrtAllocator* allocator;
  OrtTypeInfo* info;
  void* library;
  char path[4096];
  if ((count != 4 && count != 5) || *arguments[2] == 0)
    return fprintf(stderr, "usage: %s DIRECTORY TEXT BYTES [THREADS]\n", arguments[0]), 2;
  const unsigned char* text = (const unsigned char*)arguments[2];

  api = OrtGetApiBase()->GetApi(ORT_VERSION);
  if (api == NULL) return fprintf(stderr, "ONNX Runtime 1.17 or later is needed\n"), 1;
  check(api->CreateEnv(3, "ramnet", &env)); /* logs errors */
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, count == 5 ? atoi(arguments[4]) : 0));
  check(api->CreateCpuMemoryInfo(0, 0, &cpu));
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  snprintf(path, sizeof path, "%s/libramnet_onnxruntime.so", arguments[1]);
  if (access(path, R_OK) == 0) check(api->RegisterCustomOpsLibrary(options, path, &library));
  snprintf(path, sizeof path, "%s/decode.onnx", arguments[1]);
  check(api->CreateSession(env, path, options, &decode));
  check(api->CreateIoBinding(decode, &binding));

  int64_t id = 0, position[2] = {0, 0}, one[] = {1, 1}, of_logits[MOST_AXES];
  static float logits[VOCABULARY];
  size_t inputs, axes;
  int type;
  check(api->SessionGetOutputTypeInfo(decode, 0, &info));
  if (sizes_of(info, of_logits, &axes, &type) != VOCABULARY) return fprintf(stderr, "the model is not of bytes\n"), 1;
  check(api->BindInput(binding, "input_ids", tensor(&id, sizeof id, one, 2, ORT_INT64)));
  check(api->BindOutput(binding, "logits", tensor(logits, sizeof logits, of_logits, axes, type)));
  check(api->SessionGetInputCount(decode, &inputs));
  for (size_t i = 1; i < inputs; i++) {
    char* name;
    check(api->SessionGetInputName(decode, i, allocator, &name));
    check(api->SessionGetInputTypeInfo(decode, i, &info));
    bind_state(binding, name, info, position);
  }

  fputs(arguments[2], stdout);
  for (long left = (long)strlen(arguments[2]) + atol(arguments[3]); left > 0; left--) {
    if (*text != 0) id = *text++;
    else {
      id = 0;
      for (int i = 1; i < VOCABULARY; i++)
        if (logits[i] > logits[id]) id = i;
      putchar((int)id);
      fflush(stdout);
    }
    check(api->RunWithBinding(decode, NULL, binding));
    position[0] = position[1];
  }
  putchar('\n');
}
