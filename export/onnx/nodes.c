/* The node "memory" of the domain "ramnet" for ONNX Runtime, over the kernels of one model: a RAM-Net layer between its
 * projections (paper, steps 1 to 6).
 *
 *   output, memory, mass, slots = memory(projected, scale, position, memory, mass)
 *
 * of projected [B, T, 2·H·U·P + H·D], the logits of reads and of writes, then the values; scale [2, H], their factors;
 * position int64 [B]; memory [B, H, M, D] and mass [B, H, M]. The output is [B, T, H·D]; slots, int32 [B, T, 2, H, K],
 * are before CAPE. If a session binds memory and mass to the same buffers as input and as output, they are updated in
 * place; else they are copied first. Parallel work runs on the session's threads. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "kernels.h"
#include "ort.h"

enum {
  ADDRESS = ORDER * SUB_DIM,
  ROWS = 2 * HEADS, /* the addresses of a token: of its reads, then of its writes */
  WIDTH = ROWS * ADDRESS + HEADS * VALUE_DIM,
  ACCESSES = ROWS * TOP_K,
  /* Less work than this is not worth a thread. */
  TOKENS_PER_TASK = (MANY_ROWS + ROWS - 1) / ROWS,
  STEPS_PER_TASK = (32 + HEADS - 1) / HEADS
};

static const OrtApi* api;

#define TRY(call)                        \
  do {                                   \
    OrtStatus* failed_ = (call);         \
    if (failed_ != NULL) return failed_; \
  } while (0)

static OrtStatus* refuse(const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

enum { PROJECTED, SCALE, POSITION, MEMORY, MASS, INPUTS };
enum { OUTPUT, NEW_MEMORY, NEW_MASS, SLOTS_OF_TOKENS, OUTPUTS };

typedef struct {
  int64_t batch, tokens, cape_heads;
  const float *projected, *scale, *old_memory, *old_mass;
  const int64_t* position;
  float *output, *memory, *mass;
  int32_t* slots;
  /* Scratch memory. */
  float *logits, *weights, *scan;
  int32_t* shifted; /* slots after CAPE */
  size_t tasks;
  int failed;
} work;

/* The first item of a task, of count items divided among tasks. */
static int64_t first_of(int64_t count, size_t task, size_t tasks) {
  return (int64_t)((uint64_t)count * task / tasks);
}

/* Step 4: slot j of token t is (j - t) mod M in the first heads. */
static void shift(const work* of, int64_t token) {
  const int64_t at = (of->position[token / of->tokens] + token % of->tokens) % SLOTS;
  const int32_t back = (int32_t)(at < 0 ? at + SLOTS : at), moved = (int32_t)of->cape_heads * TOP_K;
  const int32_t* slots = of->slots + token * ACCESSES;
  int32_t* shifted = of->shifted + token * ACCESSES;
  for (int side = 0; side < 2; side++, slots += HEADS * TOP_K, shifted += HEADS * TOP_K)
    for (int32_t i = 0; i < HEADS * TOP_K; i++) {
      const int32_t less = slots[i] - (i < moved ? back : 0);
      shifted[i] = less < 0 ? less + SLOTS : less;
    }
}

/* Find the addresses of a task's tokens. */
static void decode(void* data, size_t task) {
  work* of = data;
  const int64_t all = of->batch * of->tokens, first = first_of(all, task, of->tasks);
  const int64_t end = first_of(all, task + 1, of->tasks), rows = (end - first) * ROWS;
  float* logits = of->logits + first * ROWS * ADDRESS;
  for (int64_t token = first; token < end; token++)
    for (int row = 0; row < ROWS; row++) {
      const float *from = of->projected + token * WIDTH + row * ADDRESS, factor = of->scale[row];
      float* to = of->logits + (token * ROWS + row) * ADDRESS;
      for (int i = 0; i < ADDRESS; i++) to[i] = from[i] * factor;
    }
  int32_t* slots = of->slots + first * ACCESSES;
  float* weights = of->weights + first * ACCESSES;
  const int status = rows < MANY_ROWS ? CALL(address_decode, I(rows), P(logits), P(slots), P(weights))
                                      : CALL(address_decode_many, I(rows), P(logits), P(slots), P(weights));
  if (status != 0) of->failed = 1;
  for (int64_t token = first; token < end; token++) shift(of, token);
}

/* Copy the state of some heads, unless it is updated where it is. */
static void copy_state(const work* of, int64_t head, int64_t heads) {
  const size_t mass = (size_t)heads * SLOTS * sizeof(float), memory = mass * VALUE_DIM;
  const int64_t at = head * SLOTS;
  if (of->memory != of->old_memory) memcpy(of->memory + at * VALUE_DIM, of->old_memory + at * VALUE_DIM, memory);
  if (of->mass != of->old_mass) memcpy(of->mass + at, of->old_mass + at, mass);
}

/* Write and read the memory of one head. */
static void scan(void* data, size_t n) {
  work* of = data;
  const int64_t head = (int64_t)n, b = head / HEADS, h = head % HEADS, first = b * of->tokens;
  const int64_t read = first * ACCESSES + h * TOP_K, write = read + HEADS * TOP_K;
  const float* values = of->projected + first * WIDTH + ROWS * ADDRESS + h * VALUE_DIM;
  float* output = of->output + (first * HEADS + h) * VALUE_DIM;
  float* scratch = of->scan + 2 * SCRATCH * head;
  copy_state(of, head, 1);
  if (CALL(memory_scan, I(of->tokens), I(ACCESSES), I(WIDTH), I(HEADS * VALUE_DIM), P(of->shifted + write),
           P(of->weights + write), P(of->shifted + read), P(of->weights + read), P(values),
           P(of->memory + head * SLOTS * VALUE_DIM), P(of->mass + head * SLOTS), P(output), P(scratch),
           P(scratch + SCRATCH)) != 0)
    of->failed = 1;
}

/* Read one token of each of a task's sequences. */
static void step(void* data, size_t task) {
  work* of = data;
  for (int64_t b = first_of(of->batch, task, of->tasks); b < first_of(of->batch, task + 1, of->tasks); b++) {
    const int64_t head = b * HEADS, read = b * ACCESSES, write = read + HEADS * TOP_K;
    copy_state(of, head, HEADS);
    if (CALL(memory_step, I(HEADS), P(of->shifted + write), P(of->weights + write), P(of->shifted + read),
             P(of->weights + read), P(of->projected + b * WIDTH + ROWS * ADDRESS),
             P(of->memory + head * SLOTS * VALUE_DIM), P(of->mass + head * SLOTS),
             P(of->output + head * VALUE_DIM)) != 0)
      of->failed = 1;
  }
}

static OrtStatus* spread(const OrtKernelContext* context, void (*task)(void* data, size_t i), int64_t tasks, work* of) {
  of->tasks = (size_t)(tasks < 1 ? 1 : tasks);
  if (of->tasks > 1) return api->KernelContext_ParallelFor(context, task, of->tasks, 0, of);
  task(of, 0);
  return NULL;
}

static OrtStatus* run(OrtKernelContext* context, work* of) {
  const int64_t tokens = of->batch * of->tokens, heads = of->batch * HEADS;
  TRY(spread(context, decode, tokens / TOKENS_PER_TASK, of));
  if (of->tokens == 1) TRY(spread(context, step, of->batch / STEPS_PER_TASK, of));
  else TRY(spread(context, scan, heads, of));
  return of->failed ? api->CreateStatus(ORT_FAIL, "a kernel of ramnet.memory failed") : NULL;
}

/* Get the elements of an input and check its sizes; -1 is any size, which is stored in ``sizes``. */
static OrtStatus* input(const OrtKernelContext* context, size_t index, size_t axes, int64_t* sizes, const void* data) {
  static const char* const names[] = {"projected", "scale", "position", "memory", "mass"};
  const OrtValue* value;
  OrtShapeInfo* info;
  int64_t found[4];
  size_t count;
  TRY(api->KernelContext_GetInput(context, index, &value));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api->GetDimensionsCount(info, &count);
  if (status == NULL && count != axes)
    status = refuse("%s of ramnet.memory has %zu axes; it must have %zu", names[index], count, axes);
  if (status == NULL) status = api->GetDimensions(info, found, axes);
  api->ReleaseTensorTypeAndShapeInfo(info);
  for (size_t i = 0; status == NULL && i < axes; i++) {
    if (sizes[i] < 0) sizes[i] = found[i];
    if (sizes[i] != found[i])
      status = refuse("axis %zu of %s of ramnet.memory is %lld; it must be %lld", i, names[index], (long long)found[i],
                      (long long)sizes[i]);
  }
  return status != NULL ? status : api->GetTensorMutableData((OrtValue*)value, (void**)data);
}

static OrtStatus* output(OrtKernelContext* context, size_t index, size_t axes, const int64_t* sizes, void* data) {
  OrtValue* value;
  TRY(api->KernelContext_GetOutput(context, index, sizes, axes, &value));
  return api->GetTensorMutableData(value, data);
}

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  work of = {.cape_heads = *(const int64_t*)kernel};
  int64_t projected[] = {-1, -1, WIDTH};
  TRY(input(context, PROJECTED, 3, projected, &of.projected));
  const int64_t batch = of.batch = projected[0], tokens = of.tokens = projected[1];
  int64_t memory[] = {batch, HEADS, SLOTS, VALUE_DIM};
  TRY(input(context, SCALE, 2, (int64_t[]){2, HEADS}, &of.scale));
  TRY(input(context, POSITION, 1, (int64_t[]){batch}, &of.position));
  TRY(input(context, MEMORY, 4, memory, &of.old_memory));
  TRY(input(context, MASS, 3, memory, &of.old_mass));
  TRY(output(context, OUTPUT, 3, (int64_t[]){batch, tokens, HEADS * VALUE_DIM}, &of.output));
  TRY(output(context, NEW_MEMORY, 4, memory, &of.memory));
  TRY(output(context, NEW_MASS, 3, memory, &of.mass));
  TRY(output(context, SLOTS_OF_TOKENS, 5, (int64_t[]){batch, tokens, 2, HEADS, TOP_K}, &of.slots));
  if (batch == 0) return NULL;
  if (tokens == 0) return copy_state(&of, 0, batch * HEADS), NULL;
  const size_t rows = (size_t)(batch * tokens) * ROWS, scans = tokens == 1 ? 0 : (size_t)(batch * HEADS) * 2 * SCRATCH;
  float* scratch = malloc((rows * (ADDRESS + 2 * TOP_K) + scans) * sizeof(float));
  if (scratch == NULL) return api->CreateStatus(ORT_FAIL, "there is no memory for ramnet.memory");
  of.logits = scratch;
  of.weights = of.logits + rows * ADDRESS;
  of.shifted = (int32_t*)(of.weights + rows * TOP_K);
  of.scan = (float*)(of.shifted + rows * TOP_K);
  OrtStatus* status = run(context, &of);
  free(scratch);
  return status;
}

/* Check that a node is one of the model that the library is built for. Its state is the number of heads with CAPE. */
static OrtStatus* create(const OrtCustomOp* op, const OrtApi* of, const OrtKernelInfo* info, void** kernel) {
  static const struct { const char* name; int64_t value; } sizes[] = {
      {"order", ORDER}, {"sub_dim", SUB_DIM}, {"top_k", TOP_K}};
  static const struct { const char* name; float value; } constants[] = {{"decay_power", DECAY_POWER}, {"eps", EPS}};
  (void)op, (void)of;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    int64_t found;
    TRY(api->KernelInfoGetAttribute_int64(info, sizes[i].name, &found));
    if (found != sizes[i].value)
      return refuse("a node has %s %lld; this library is built for %lld", sizes[i].name, (long long)found,
                    (long long)sizes[i].value);
  }
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
    float found;
    TRY(api->KernelInfoGetAttribute_float(info, constants[i].name, &found));
    if (found != constants[i].value)
      return refuse("a node has %s %g; this library is built for %g", constants[i].name, found, constants[i].value);
  }
  int64_t cape_heads;
  TRY(api->KernelInfoGetAttribute_int64(info, "cape_heads", &cape_heads));
  if (cape_heads < 0 || cape_heads > HEADS)
    return refuse("a node has cape_heads %lld; it must be in 0..%d", (long long)cape_heads, HEADS);
  *kernel = malloc(sizeof cape_heads);
  if (*kernel == NULL) return api->CreateStatus(ORT_FAIL, "there is no memory for ramnet.memory");
  memcpy(*kernel, &cape_heads, sizeof cape_heads);
  return NULL;
}

static const char* name(const OrtCustomOp* op) { return (void)op, "memory"; }
static const char* provider(const OrtCustomOp* op) { return (void)op, NULL; }
static size_t inputs(const OrtCustomOp* op) { return (void)op, INPUTS; }
static size_t outputs(const OrtCustomOp* op) { return (void)op, OUTPUTS; }
static int of_input(const OrtCustomOp* op, size_t i) { return (void)op, i == POSITION ? ORT_INT64 : ORT_FLOAT; }
static int of_output(const OrtCustomOp* op, size_t i) { return (void)op, i == SLOTS_OF_TOKENS ? ORT_INT32 : ORT_FLOAT; }
static int zero(const OrtCustomOp* op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp* op) { return (void)op, 1; }

static const OrtCustomOp memory_node = {
    .version = ORT_VERSION, .GetName = name, .GetExecutionProviderType = provider,
    .GetInputType = of_input, .GetInputTypeCount = inputs, .GetOutputType = of_output, .GetOutputTypeCount = outputs,
    .GetInputCharacteristic = zero, .GetOutputCharacteristic = zero, .GetInputMemoryType = zero,
    .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one, .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one, .GetStartVersion = one, .GetEndVersion = one,
    .CreateKernelV2 = create, .KernelComputeV2 = compute, .KernelDestroy = free,
};

RAMNET_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  api = base->GetApi(ORT_VERSION);
  if (api == NULL) return base->GetApi(1)->CreateStatus(ORT_FAIL, "ramnet's nodes need ONNX Runtime 1.17 or later");
  if (choose_kernels()) return refuse("%s", ramnet_message());
  OrtDomain* domain; /* is never released, as sessions refer to it */
  TRY(api->CreateCustomOpDomain("ramnet", &domain));
  TRY(api->CustomOpDomain_Add(domain, &memory_node));
  return api->AddCustomOpDomain(options, domain);
}
