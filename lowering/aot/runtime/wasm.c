/* What WebAssembly has instead of threads and files: none. */
#include <stddef.h>
#include <wasi/api.h>

#include "pool.h"

pool* pool_start(int threads) {
  (void)threads;
  return NULL;
}

void pool_stop(pool* pool) { (void)pool; }

void pool_rest(pool* pool) { (void)pool; }

void pool_run(void* runtime, int tasks, void (*task)(void* context, int i), void* context) {
  (void)runtime;
  for (int i = 0; i < tasks; i++) task(context, i);
}

/* libc refers to these, although messages are printed to memory only. Without them, the module would import
 * them. */
__wasi_errno_t __wasi_fd_close(__wasi_fd_t file) {
  (void)file;
  return __WASI_ERRNO_BADF;
}

__wasi_errno_t __wasi_fd_seek(__wasi_fd_t file, __wasi_filedelta_t offset, __wasi_whence_t whence,
                              __wasi_filesize_t* position) {
  (void)file, (void)offset, (void)whence, (void)position;
  return __WASI_ERRNO_BADF;
}

__wasi_errno_t __wasi_fd_write(__wasi_fd_t file, const __wasi_ciovec_t* parts, size_t count, __wasi_size_t* written) {
  (void)file, (void)parts, (void)count, (void)written;
  return __WASI_ERRNO_BADF;
}

void __wasi_proc_exit(__wasi_exitcode_t code) {
  (void)code;
  __builtin_trap();
}
