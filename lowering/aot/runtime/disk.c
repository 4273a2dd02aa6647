/* Weights and states in files on disk. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
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

/* Flush the name of a file to disk, as far as the file system can. */
static void sync_folder(char* path) {
  char* slash = strrchr(path, '/');
  if (slash != NULL) slash[slash == path] = '\0'; /* "/" stays */
  const int folder = open(slash == NULL ? "." : path, O_RDONLY | O_CLOEXEC);
  if (folder < 0) return;
  (void)fsync(folder);
  close(folder);
}

/* The file is written beside its name, which it takes at the end. The name beside it is this call's own: other threads,
 * and processes of this number elsewhere, may save to the same path. */
int ramnet_state_save(const ramnet_state* state, const char* path) {
  static atomic_uint calls;
  char aside[4096];
  output out = {NULL, 0};
  int handle;
  do {
    const unsigned call = atomic_fetch_add(&calls, 1);
    if ((size_t)snprintf(aside, sizeof aside, "%s.%ld.%u.aside", path, (long)getpid(), call) >= sizeof aside)
      return fail(RAMNET_BAD_ARGUMENT, "the path of %zu bytes is too long", strlen(path));
    handle = open(aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (handle < 0 && errno == EEXIST);
  if (handle >= 0 && (out.stream = fdopen(handle, "wb")) == NULL) {
    close(handle);
    remove(aside);
  }
  if (out.stream == NULL) return fail(RAMNET_BAD_FILE, "%s cannot be written: %s", path, strerror(errno));
  state_write(state, put, &out);
  if (!out.failed && (fflush(out.stream) != 0 || fsync(fileno(out.stream)) != 0)) out.failed = errno;
  if (fclose(out.stream) != 0 && !out.failed) out.failed = errno;
  if (!out.failed && rename(aside, path) != 0) out.failed = errno;
  if (!out.failed) {
    sync_folder(aside);
    return RAMNET_OK;
  }
  remove(aside);
  return fail(RAMNET_BAD_FILE, "%s cannot be written: %s", path, strerror(out.failed));
}
