/* Weights and states in files on disk. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model.h"

/* Map a whole file into memory. */
static int map(const char* path, void** bytes, size_t* size) {
  struct stat status;
  const int handle = open(path, O_RDONLY | O_CLOEXEC);
  if (handle < 0) return fail(RAMNET_BAD_FILE, "%s cannot be opened: %s", path, strerror(errno));
  if (fstat(handle, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size == 0) {
    close(handle);
    return fail(RAMNET_BAD_FILE, "%s is not a safetensors file", path);
  }
  *size = (size_t)status.st_size;
  *bytes = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, handle, 0);
  close(handle);
  if (*bytes == MAP_FAILED) return fail(RAMNET_NO_MEMORY, "%s cannot be mapped: %s", path, strerror(errno));
  return RAMNET_OK;
}

static void unmap(void* bytes, size_t size) { munmap(bytes, size); }

int ramnet_open(const char* path, int threads, ramnet_model** model) {
  void* bytes;
  size_t size;
  int status = choose_kernels();
  if (status == 0) status = map(path, &bytes, &size);
  if (status) return status;
  status = open_named(path, bytes, size, threads, model);
  if (status) {
    unmap(bytes, size);
    return status;
  }
  (*model)->unmap = unmap;
  (*model)->mapped = bytes;
  (*model)->mapped_bytes = size;
  return RAMNET_OK;
}

int ramnet_state_load(ramnet_state* state, const char* path) {
  void* bytes;
  size_t size;
  int status = map(path, &bytes, &size);
  if (status) return status;
  status = state_read(state, path, bytes, size);
  unmap(bytes, size);
  return status;
}

typedef struct {
  FILE* stream;
  int failed; /* errno */
} output;

static void put(void* to, const void* data, size_t bytes) {
  output* out = to;
  if (!out->failed && bytes > 0 && fwrite(data, 1, bytes, out->stream) != bytes) out->failed = errno ? errno : EIO;
}

/* The file is written beside its name, which it takes at the end. */
int ramnet_state_save(const ramnet_state* state, const char* path) {
  char aside[4096];
  output out = {NULL, 0};
  if ((size_t)snprintf(aside, sizeof aside, "%s.%ld.aside", path, (long)getpid()) >= sizeof aside)
    return fail(RAMNET_BAD_ARGUMENT, "the path of %zu bytes is too long", strlen(path));
  out.stream = fopen(aside, "wb");
  if (out.stream == NULL) return fail(RAMNET_BAD_FILE, "%s cannot be written: %s", path, strerror(errno));
  state_write(state, put, &out);
  if (!out.failed && (fflush(out.stream) != 0 || fsync(fileno(out.stream)) != 0)) out.failed = errno;
  if (fclose(out.stream) != 0 && !out.failed) out.failed = errno;
  if (!out.failed && rename(aside, path) != 0) out.failed = errno;
  if (!out.failed) return RAMNET_OK;
  remove(aside);
  return fail(RAMNET_BAD_FILE, "%s cannot be written: %s", path, strerror(out.failed));
}
