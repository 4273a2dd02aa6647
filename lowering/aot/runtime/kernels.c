#include "kernels.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[4096 + 256]; /* with the longest path */
static _Thread_local const executor* current;

const char* ramnet_message(void) { return message; }

int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return status;
}

/* The environment of a task in TVM's calling convention. */
typedef struct {
  void* barrier;
  int32_t tasks;
} environment;

typedef int loop(int task, environment* environment, void* data);

typedef struct {
  loop* body;
  void* data;
  environment environment;
  atomic_int failed;
} launched;

static void run_task(void* context, int task) {
  launched* work = context;
  if (work->body(task, &work->environment, work->data) != 0) work->failed = 1;
}

static int launch(loop* body, void* data, int tasks) {
  const executor* on = current;
  launched work = {.body = body, .data = data, .environment = {NULL, 1}};
  (void)tasks; /* kernels ask for as many as there are threads */
  if (on == NULL || on->threads < 2) {
    run_task(&work, 0);
  } else {
    work.environment.tasks = on->threads;
    on->parallel(on->runtime, on->threads, run_task, &work);
  }
  return work.failed ? -1 : 0;
}

void run_on(const executor* executor) { current = executor; }

/* TVM's kernels call through these pointers, which each object defines as weak symbols. No kernel of this library
 * has a workspace. */
extern int (*__TVMBackendParallelLaunch)(loop*, void*, int);
int (*__TVMBackendParallelLaunch)(loop*, void*, int) = launch;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count);

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  size_t used = (size_t)snprintf(message, sizeof message, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) {
    if (parts[i] == NULL || used + 1 >= sizeof message) continue;
    used += (size_t)snprintf(message + used, sizeof message - used, "%s", parts[i]);
  }
}

int call(kernel* function, const argument* arguments, int32_t count) {
  argument result = {0, 0, {0}};
  return function(NULL, arguments, count, &result) == 0 ? RAMNET_OK : RAMNET_FAILED;
}
