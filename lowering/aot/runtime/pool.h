/* A pool of threads for parallel loops. */
#ifndef RAMNET_POOL_H
#define RAMNET_POOL_H

#include "ramnet.h"

typedef struct pool pool;

/* Start threads - 1 threads; NULL if there is no memory or the system starts no more. */
pool* pool_start(int threads);
void pool_stop(pool* pool);

/* A ramnet_parallel whose runtime is a pool. The caller runs the tasks alone while another thread uses the pool, and in
 * a process that was forked after the pool was started. */
void pool_run(void* runtime, int tasks, void (*task)(void* context, int i), void* context);

/* Let idle threads sleep at once until the next loop, instead of looking for it. The pool may be NULL. */
void pool_rest(pool* pool);

#endif
