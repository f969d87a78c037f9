/* A thread pool. Workers spin for a moment after a job, since the next linear follows soon, and then sleep until they are woken.
 *
 * A worker joins a job only while the job is open: the caller takes pieces too, closes the job when none are left, and waits for the workers
 * that joined. So a worker that the system does not run delays nobody. One caller uses the workers at a time; another runs its job alone.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

enum { SPIN_WORKER = 60000, SPIN_CALLER = 20000, LIMIT = 256 }; /* nanoseconds, nanoseconds, workers */

/* The state of the current job: its number << 32 | open << 31 | seats left << 16 | workers at work. */
#define OPEN (UINT64_C(1) << 31)
#define SEAT (UINT64_C(1) << 16)
#define SEATS (UINT64_C(0x7fff) << 16)
#define WORKING UINT64_C(0xffff)

static struct {
    pthread_mutex_t caller; /* held by the thread whose job runs */
    pthread_mutex_t lock;   /* for the two conditions */
    pthread_cond_t posted, finished;
    _Atomic uint64_t state;
    atomic_int sleeping, awaited;
    int workers, cores, crowded; /* crowded: more threads than cores */
    uint32_t number;
    void (*run)(void *, int64_t, int64_t);
    void *argument;
    int64_t count, step;
    _Atomic int64_t next;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .posted = PTHREAD_COND_INITIALIZER,
          .finished = PTHREAD_COND_INITIALIZER};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void take_pieces(void) {
    for (int64_t first; (first = atomic_fetch_add(&pool.next, pool.step)) < pool.count;)
        pool.run(pool.argument, first, pool.count - first < pool.step ? pool.count : first + pool.step);
}

static int joinable(uint64_t state) { return (state & OPEN) && (state & SEATS); }

/* The state of a job that can be joined; spins, then sleeps. */
static uint64_t next_job(int spins) {
    uint64_t state;
    if (spins)
        for (int64_t end = now() + SPIN_WORKER; now() < end;)
            for (int i = 0; i < 32; i++) {
                if (joinable(state = atomic_load(&pool.state)))
                    return state;
                pause_briefly();
            }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1); /* before the state is read: the caller writes the state, then reads this */
    while (!joinable(state = atomic_load(&pool.state)))
        pthread_cond_wait(&pool.posted, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
    return state;
}

static void *work(void *unused) {
    (void)unused;
    for (int spins = 0;;) {
        uint64_t state = next_job(spins);
        while (joinable(state) && !atomic_compare_exchange_weak(&pool.state, &state, state - SEAT + 1))
            ;
        if (!joinable(state))
            continue;
        spins = !pool.crowded; /* with more threads than cores, spinning would keep another from its work */
        take_pieces();
        if ((atomic_fetch_sub(&pool.state, 1) & WORKING) == 1 && atomic_load(&pool.awaited)) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.finished);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

static void start_workers(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals go to the program's own threads */
    for (; pool.workers < wanted; pool.workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL))
            break; /* the job runs on those that exist */
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* A forked child has none of the workers, and locks in any state. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.posted, NULL);
    pthread_cond_init(&pool.finished, NULL);
    atomic_store(&pool.state, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.awaited, 0);
    pool.workers = 0;
}

static void set_up(void) {
    pthread_atfork(NULL, NULL, forget_workers);
    pool.cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set))
        pool.cores = CPU_COUNT(&set);
#endif
}

static void wait_for_workers(void) {
    int64_t end = now() + SPIN_CALLER;
    while (atomic_load(&pool.state) & WORKING) {
        if (now() < end) {
            pause_briefly();
            continue;
        }
        pthread_mutex_lock(&pool.lock);
        atomic_exchange(&pool.awaited, 1); /* not a store, which QEMU's aarch64 lets the next load overtake */
        while (atomic_load(&pool.state) & WORKING)
            pthread_cond_wait(&pool.finished, &pool.lock);
        atomic_store(&pool.awaited, 0);
        pthread_mutex_unlock(&pool.lock);
    }
}

void fedtune_pool_run(int threads, int64_t count, int64_t step, void (*run)(void *, int64_t, int64_t), void *argument) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int64_t pieces = (count + step - 1) / step;
    int others = (int)((pieces < threads ? pieces : threads) - 1);
    if (others > LIMIT)
        others = LIMIT;
    if (others < 1 || (pthread_once(&once, set_up), pthread_mutex_trylock(&pool.caller))) {
        run(argument, 0, count);
        return;
    }
    start_workers(others);
    pool.run = run, pool.argument = argument, pool.count = count, pool.step = step, pool.crowded = threads > pool.cores;
    atomic_store(&pool.next, 0);
    atomic_exchange(&pool.state, (uint64_t)++pool.number << 32 | OPEN | (uint64_t)others * SEAT); /* no store, as in wait_for_workers */
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        for (int i = 0; i < others; i++)
            pthread_cond_signal(&pool.posted);
        pthread_mutex_unlock(&pool.lock);
    }
    take_pieces();
    atomic_fetch_and(&pool.state, ~(OPEN | SEATS));
    wait_for_workers();
    pthread_mutex_unlock(&pool.caller);
}
