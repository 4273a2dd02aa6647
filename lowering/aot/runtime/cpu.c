/* Chooses the kernels that the CPU can run. */
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>

static inline int avx_vnni(void) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

_Atomic(const kernel_set*) kernels;

#define KERNEL(set, name) kernel __tvm_ffi_ramnet_##set##_##name;
#define SET(set, needs) KERNELS(KERNEL, set)
SETS
#undef KERNEL
#undef SET

/* Append a feature that the CPU lacks to a list, unless the list is full. */
static inline void append(char list[160], const char* feature) {
  const size_t used = strlen(list);
  if (used + strlen(feature) + 3 > 160) return;
  strcat(used ? strcat(list, ", ") : list, feature);
}

int choose_kernels(void) {
  char lacking[160];
#define KERNEL(set, name) __tvm_ffi_ramnet_##set##_##name,
#define NEEDS(feature, found) \
  if (!(found)) append(lacking, feature);
#define SET(set, needs)                                        \
  {                                                            \
    static const kernel_set of_##set = {KERNELS(KERNEL, set)}; \
    lacking[0] = 0;                                            \
    needs;                                                     \
    if (lacking[0] == 0) {                                     \
      kernels = &of_##set;                                     \
      return RAMNET_OK;                                        \
    }                                                          \
  }
  SETS
  return fail(RAMNET_BAD_CPU, "the library needs a CPU with %s, which this one lacks", lacking);
}
