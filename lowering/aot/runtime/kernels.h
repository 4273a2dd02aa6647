/* Calls of kernels compiled by TVM, and the two symbols that they need instead of TVM's runtime. */
#ifndef RAMNET_KERNELS_H
#define RAMNET_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "config.h"
#include "ramnet.h"

/* An argument in TVM's calling convention. */
typedef struct {
  int32_t type;
  uint32_t padding;
  union {
    int64_t integer;
    const void* pointer;
  } value;
} argument;

enum { INTEGER = 1, POINTER = 4 };

#define I(x) {INTEGER, 0, {.integer = (x)}}
#define P(x) {POINTER, 0, {.pointer = (x)}}

typedef int kernel(void* self, const argument* arguments, int32_t count, argument* result);

/* The kernels of a library, compiled for one kind of CPU. */
typedef struct {
#define KERNEL(set, name) kernel* name;
  KERNELS(KERNEL, )
#undef KERNEL
} kernel_set;

/* Those for this CPU, once choose_kernels() has returned 0. */
extern _Atomic(const kernel_set*) kernels;

/* Return 0, or RAMNET_BAD_CPU if the CPU can run none of the library's sets. */
int choose_kernels(void);

/* Call a kernel with arguments in braces. Evaluates to 0 or RAMNET_FAILED. */
#define CALL(name, ...) call(kernels->name, (const argument[]){__VA_ARGS__}, \
                             (int32_t)(sizeof((const argument[]){__VA_ARGS__}) / sizeof(argument)))

/* Call a kernel of which each kind of layer has its own. */
#define CALL_KIND(kind, name, ...) call(((kernel* const[]){KINDS(kernels->name)})[kind], \
                                        (const argument[]){__VA_ARGS__}, \
                                        (int32_t)(sizeof((const argument[]){__VA_ARGS__}) / sizeof(argument)))

int call(kernel* function, const argument* arguments, int32_t count);

/* Where the calling thread's kernels run their parallel loops, until it is set again; NULL for the thread alone. */
typedef struct {
  ramnet_parallel parallel;
  void* runtime;
  int threads;
} executor;

void run_on(const executor* executor);

/* Set the message of this thread and return the status. */
int fail(int status, const char* format, ...);

#endif
