/* The pool: n - 1 threads and the caller meet at one barrier, before, inside and after each piece
 * of work.
 *
 * Waiting spins, since the others are usually a few microseconds behind, then sleeps. How long it
 * spins is learnt: on a crowded machine the others are not running, and spinning keeps them from
 * it. (Measured with SmolLM2, two threads that share one processor: 80 tokens a second with 1000
 * spins, 145 with 200, 175 with 50; with a processor for each: 300 with 1000.) */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels.h"

enum { LEAST_SPINS = 16, MOST_SPINS = 4096 }; /* at most some 50 us, a few times a sleep's cost */

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

/* How long one thread spins; each has its own. */
typedef struct {
    int between, inside; /* two pieces of work; one piece */
    char padding[MEMORY_ALIGN - 2 * sizeof(int)];
} patience;

typedef struct {
    atomic_uint round; /* counts the meetings; what sleepers sleep on */
    atomic_int arrived;
    atomic_int sleepers;
    int n_threads;
    pthread_mutex_t mutex; /* where there is no futex */
    pthread_cond_t changed;
} barrier;

struct thread_pool {
    barrier barrier;
    pool_work work; /* NULL: the threads end */
    void *arg;
    pid_t owner;
    int n_threads;
    pthread_t *threads; /* (n_threads - 1) */
    patience *patience; /* (n_threads) */
};

typedef struct {
    thread_pool *pool;
    int thread;
} start;

static inline void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_until_changed(barrier *b, unsigned round)
{
    atomic_fetch_add(&b->sleepers, 1);
#if defined(__linux__)
    /* the kernel compares again, so that a change in between is not missed */
    while (atomic_load(&b->round) == round)
        syscall(SYS_futex, &b->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
#else
    pthread_mutex_lock(&b->mutex);
    while (atomic_load(&b->round) == round)
        pthread_cond_wait(&b->changed, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
#endif
    atomic_fetch_sub(&b->sleepers, 1);
}

static void wake_sleepers(barrier *b)
{
    if (atomic_load(&b->sleepers) == 0)
        return;
#if defined(__linux__)
    syscall(SYS_futex, &b->round, FUTEX_WAKE_PRIVATE, b->n_threads, NULL, NULL, 0);
#else
    pthread_mutex_lock(&b->mutex);
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->mutex);
#endif
}

/* A spin that was in vain halves the patience, one that was not adds an eighth. */
static void meet(barrier *b, int *spins)
{
    if (b->n_threads == 1)
        return;
    const unsigned round = atomic_load(&b->round);
    if (atomic_fetch_add(&b->arrived, 1) == b->n_threads - 1) {
        atomic_store(&b->arrived, 0);
        atomic_store(&b->round, round + 1);
        wake_sleepers(b);
        return;
    }
    for (int i = 0; i < *spins; i++) {
        if (atomic_load_explicit(&b->round, memory_order_acquire) != round) {
            *spins += *spins < MOST_SPINS ? *spins / 8 : 0;
            return;
        }
        pause_briefly();
    }
    *spins = *spins / 2 > LEAST_SPINS ? *spins / 2 : LEAST_SPINS;
    sleep_until_changed(b, round);
}

static void *thread_main(void *arg)
{
    const start s = *(start *)arg;
    free(arg);
    patience *mine = &s.pool->patience[s.thread];
    for (;;) {
        meet(&s.pool->barrier, &mine->between);
        if (!s.pool->work)
            return NULL;
        s.pool->work(s.pool->arg, s.thread);
        meet(&s.pool->barrier, &mine->inside);
    }
}

static int start_thread(thread_pool *pool, int thread)
{
    start *s = malloc(sizeof *s);
    if (!s)
        return -1;
    *s = (start){pool, thread};
    if (pthread_create(&pool->threads[thread - 1], NULL, thread_main, s) == 0)
        return 0;
    free(s);
    return -1;
}

static void forget(thread_pool *pool)
{
    pthread_mutex_destroy(&pool->barrier.mutex);
    pthread_cond_destroy(&pool->barrier.changed);
    free(pool->threads);
    free(pool->patience);
    free(pool);
}

/* Returns how many there are, the caller included. Signals are the interpreter's business: the new
 * threads block them. */
static int start_threads(thread_pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int n = 1;
    while (n < pool->n_threads && start_thread(pool, n) == 0)
        n++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return n;
}

thread_pool *pool_create(int n_threads)
{
    thread_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    pool->patience = calloc((size_t)n_threads, sizeof *pool->patience);
    if (!pool->threads || !pool->patience) {
        free(pool->threads);
        free(pool->patience);
        free(pool);
        return NULL;
    }
    for (int i = 0; i < n_threads; i++)
        pool->patience[i] = (patience){.between = MOST_SPINS, .inside = MOST_SPINS};
    pool->n_threads = pool->barrier.n_threads = n_threads;
    pool->owner = getpid();
    pthread_mutex_init(&pool->barrier.mutex, NULL);
    pthread_cond_init(&pool->barrier.changed, NULL);
    const int n = start_threads(pool);
    if (n == n_threads)
        return pool;
    /* those that could not start count as waiting, so that the others can meet and end */
    atomic_fetch_add(&pool->barrier.arrived, n_threads - n);
    pool->n_threads = n;
    pool_destroy(pool);
    return NULL;
}

int pool_size(const thread_pool *pool) { return pool->n_threads; }

int pool_is_ours(const thread_pool *pool) { return pool->owner == getpid(); }

void pool_barrier(thread_pool *pool, int thread)
{
    meet(&pool->barrier, &pool->patience[thread].inside);
}

void pool_run(thread_pool *pool, pool_work work, void *arg)
{
    pool->work = work;
    pool->arg = arg;
    meet(&pool->barrier, &pool->patience[0].between);
    work(arg, 0);
    meet(&pool->barrier, &pool->patience[0].inside);
}

void pool_destroy(thread_pool *pool)
{
    if (!pool)
        return;
    if (pool_is_ours(pool)) {
        pool->work = NULL;
        meet(&pool->barrier, &pool->patience[0].between);
        for (int i = 0; i < pool->n_threads - 1; i++)
            pthread_join(pool->threads[i], NULL);
    }
    forget(pool);
}
