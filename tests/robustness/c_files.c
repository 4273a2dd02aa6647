/* Reads the input as a file of weights or, if its first byte is odd, of a state, and uses what was loaded.
 *
 * FUZZ_WEIGHTS names a good file of weights, with which states are loaded. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ramnet.h"

static ramnet_model* model;
static ramnet_state* state;
static int file;
static char path[64];
static float* logits;

int LLVMFuzzerInitialize(int* count, char*** arguments);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int LLVMFuzzerInitialize(int* count, char*** arguments) {
  (void)count, (void)arguments;
  if (ramnet_open(getenv("FUZZ_WEIGHTS"), 1, &model) || ramnet_state_create(model, &state)) abort();
  if ((file = memfd_create("input", 0)) < 0) abort();
  if ((logits = malloc(sizeof *logits * (size_t)ramnet_vocabulary())) == NULL) abort();
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  return 0;
}

static void use(const ramnet_model* on, ramnet_state* with, int32_t id) {
  if (ramnet_token(on, with, id % ramnet_vocabulary(), logits)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  if (ftruncate(file, 0) || pwrite(file, data + 1, size - 1, 0) != (ssize_t)(size - 1)) abort();
  if (data[0] & 1) {
    ramnet_state_load(state, path);
    use(model, state, data[0]);
    return 0;
  }
  ramnet_model* loaded;
  ramnet_state* fresh;
  if (ramnet_open(path, 1, &loaded)) return 0;
  if (ramnet_state_create(loaded, &fresh)) abort();
  use(loaded, fresh, data[0]);
  ramnet_state_free(fresh);
  ramnet_close(loaded);
  return 0;
}
