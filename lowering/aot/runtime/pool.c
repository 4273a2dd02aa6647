#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <threads.h>

#include "config.h"

/* How often the caller looks whether the workers have finished, before it lets them have its processor. */
enum { SPINS_AT_END = 1000 };

static unsigned forks; /* how many times this process and its ancestors forked since the first pool */
static once_flag counting = ONCE_FLAG_INIT;

struct pool {
  int threads; /* besides the caller's */
  unsigned forks; /* when they were started: a forked process has none of them */
  thrd_t* handles;
  mtx_t use, sleep;
  cnd_t work;
  atomic_uint round;  /* counts loops; workers wait for it to change */
  atomic_int next;    /* the next task */
  atomic_int pending; /* workers that have not finished the round */
  atomic_int sleeping;
  atomic_int resting; /* workers sleep at once */
  atomic_int ending;
  int tasks;
  void (*task)(void*, int);
  void* context;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void run_tasks(pool* p) {
  for (int i; (i = atomic_fetch_add(&p->next, 1)) < p->tasks;) p->task(p->context, i);
}

static void wait_for_round(pool* p, unsigned seen) {
  for (int i = 0; i < SPINS && !atomic_load(&p->resting); i++) {
    if (atomic_load(&p->round) != seen) return;
    pause_briefly();
  }
  mtx_lock(&p->sleep);
  atomic_fetch_add(&p->sleeping, 1);
  while (atomic_load(&p->round) == seen) cnd_wait(&p->work, &p->sleep);
  atomic_fetch_sub(&p->sleeping, 1);
  mtx_unlock(&p->sleep);
}

static int work(void* given) {
  pool* p = given;
  for (unsigned seen = 0;; seen++) {
    wait_for_round(p, seen);
    if (atomic_load(&p->ending)) return 0;
    run_tasks(p);
    atomic_fetch_sub(&p->pending, 1);
  }
}

static void next_round(pool* p) {
  atomic_fetch_add(&p->round, 1);
  if (atomic_load(&p->sleeping) == 0) return;
  mtx_lock(&p->sleep);
  cnd_broadcast(&p->work);
  mtx_unlock(&p->sleep);
}

static void count_fork(void) { forks++; }
static void count_forks(void) { pthread_atfork(NULL, NULL, count_fork); }
static bool has_threads(const pool* p) { return p->forks == forks; }

pool* pool_start(int threads) {
  pool* p = calloc(1, sizeof *p);
  if (p == NULL) return NULL;
  call_once(&counting, count_forks);
  p->forks = forks;
  p->handles = calloc((size_t)threads, sizeof *p->handles);
  mtx_init(&p->use, mtx_plain);
  mtx_init(&p->sleep, mtx_plain);
  cnd_init(&p->work);
  while (p->handles != NULL && p->threads < threads - 1) {
    if (thrd_create(&p->handles[p->threads], work, p) != thrd_success) break;
    p->threads++;
  }
  if (p->handles != NULL && p->threads == threads - 1) return p;
  pool_stop(p);
  return NULL;
}

void pool_stop(pool* p) {
  if (p == NULL) return;
  if (has_threads(p)) {
    atomic_store(&p->ending, 1);
    next_round(p);
    for (int i = 0; i < p->threads; i++) thrd_join(p->handles[i], NULL);
    mtx_destroy(&p->use);
    mtx_destroy(&p->sleep);
    cnd_destroy(&p->work);
  }
  free(p->handles);
  free(p);
}

void pool_run(void* runtime, int tasks, void (*task)(void* context, int i), void* context) {
  pool* p = runtime;
  if (!has_threads(p) || mtx_trylock(&p->use) != thrd_success) {
    for (int i = 0; i < tasks; i++) task(context, i);
    return;
  }
  p->tasks = tasks;
  p->task = task;
  p->context = context;
  atomic_store(&p->resting, 0);
  atomic_store(&p->next, 0);
  atomic_store(&p->pending, p->threads);
  next_round(p);
  run_tasks(p);
  for (int spins = 0; atomic_load(&p->pending) > 0; spins++) {
    if (spins < SPINS_AT_END) pause_briefly();
    else thrd_yield(); /* on a busy machine, to the worker that this waits for */
  }
  mtx_unlock(&p->use);
}

void pool_rest(pool* p) {
  if (p != NULL) atomic_store(&p->resting, 1);
}
